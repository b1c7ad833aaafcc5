/* Scratch memory whose size depends on a call: what generated C calls where a runtime is not there to give it. */
#include <stdint.h>
#include <stdlib.h>

void* TVMBackendAllocWorkspace(int type, int id, uint64_t size, int code, int bits) {
  (void)type; (void)id; (void)code; (void)bits;
  return size < PTRDIFF_MAX ? malloc((size_t)size + 1) : NULL;
}
int TVMBackendFreeWorkspace(int type, int id, void* memory) {
  (void)type; (void)id;
  free(memory);
  return 0;
}
