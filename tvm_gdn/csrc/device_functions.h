// Functions that generated device code calls by name (`T.call_extern`); put in front of it when it is compiled.
#pragma once

// Whether a vector of `bytes` may be read or written at an address: a misaligned one would end the device's context.
static __device__ __forceinline__ bool tvm_gdn_aligned(const void* address, int bytes) {
  return ((unsigned long long)address & (unsigned long long)(bytes - 1)) == 0;
}
