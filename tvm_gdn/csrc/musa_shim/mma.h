// See musa_runtime.h; CUDA's header of the same name is the next one that the compiler finds.
#pragma once
#include_next <mma.h>
namespace mtmusa {
namespace wmma = nvcuda::wmma;
}
