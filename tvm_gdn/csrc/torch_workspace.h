// Scratch memory of a launcher that is compiled together with its kernels: tensors of the caller's framework (torch's allocations
// on its current stream), which tvm_ffi asks for. `images.py` puts it in front of generated launchers that call it.
#include <unordered_map>

#include <tvm/ffi/c_api.h>
#include <tvm/ffi/extra/c_env_api.h>

// What the calls in progress on this thread hold, by address.
static thread_local std::unordered_map<void*, TVMFFIObjectHandle> tvm_gdn_held;

// Null where there is none; the framework's error is then set.
static void* tvm_gdn_allocate(int32_t, int32_t device, uint64_t bytes, int32_t, int32_t) {
  int64_t shape = bytes ? (int64_t)bytes : 1;
  DLTensor wanted = {};
  wanted.device = {static_cast<DLDeviceType>(TVM_GDN_DEVICE_TYPE), device};
  wanted.ndim = 1;
  wanted.dtype = {kDLUInt, 8, 1};
  wanted.shape = &shape;
  TVMFFIObjectHandle tensor = nullptr;
  if (TVMFFIEnvTensorAlloc(&wanted, &tensor)) return nullptr;
  DLTensor* made = TVMFFITensorGetDLTensorPtr(tensor);
  void* address = static_cast<char*>(made->data) + made->byte_offset;
  tvm_gdn_held[address] = tensor;
  return address;
}

static int32_t tvm_gdn_give_back(int32_t, int32_t, void* address) {
  auto found = tvm_gdn_held.find(address);
  if (found != tvm_gdn_held.end()) {
    TVMFFIObjectDecRef(found->second);
    tvm_gdn_held.erase(found);
  }
  return 0;
}
