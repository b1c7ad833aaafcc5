// Lets nvcc compile a .mu file of tvm_gdn: the names of the MUSA runtime that such a file uses, as those of the CUDA runtime.
// For tests on NVIDIA machines; a MUSA toolkit has headers of its own.
#pragma once
#include <cuda_runtime.h>
#ifdef __CUDA_ARCH__
#define __MUSA_ARCH__ 310
#endif
// The tensors are an NVIDIA device's here (kDLCUDA).
#define TVM_GDN_DEVICE_TYPE 2
#define musaStream_t cudaStream_t
#define musaError_t cudaError_t
#define musaSuccess cudaSuccess
#define musaGetLastError cudaGetLastError
#define musaGetErrorString cudaGetErrorString
#define musaGetDevice cudaGetDevice
#define musaSetDevice cudaSetDevice
#define musaFuncSetAttribute cudaFuncSetAttribute
#define musaFuncAttributeMaxDynamicSharedMemorySize cudaFuncAttributeMaxDynamicSharedMemorySize
