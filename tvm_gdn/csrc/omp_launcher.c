/* Runs TVM's parallel regions on the OpenMP threads that torch already uses.
 *
 * TVM's own pool pins and spins a second set of threads next to torch's. This file hands the work to the OpenMP runtime that
 * is already mapped into the process (torch's libgomp, or libiomp5/libomp, which export the same entry point), so there is one
 * pool and torch.set_num_threads governs it. It is linked against no OpenMP library on purpose: linking could load a second one.
 *
 * Built once per pack; `load.py` puts the three functions below into every kernel library.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef struct {
  void* sync_handle;
  int32_t num_task;
} TVMParallelGroupEnv;
typedef int (*ParallelLambda)(int task_id, TVMParallelGroupEnv* env, void* cdata);

typedef void (*GompParallel)(void (*fn)(void*), void* data, unsigned num_threads, unsigned flags);
typedef int (*OmpQuery)(void);

static GompParallel gomp_parallel;
static OmpQuery omp_thread_num, omp_max_threads, omp_inside, omp_team_size, torch_threads;
static char omp_path[1024];
static int forked;

/* A forked child has no pool threads left; starting a team there hangs. Called by load.py where the fork came first. */
void tvm_gdn_launcher_forked(void) { forked = 1; }

static int visit(struct dl_phdr_info* info, size_t size, void* data) {
  (void)size;
  (void)data;
  const char* name = info->dlpi_name;
  if (!name || !*name) return 0;
  const char* base = strrchr(name, '/');
  base = base ? base + 1 : name;
  int is_omp = !strncmp(base, "libgomp", 7) || !strncmp(base, "libiomp5", 8) || !strncmp(base, "libomp", 6);
  int is_torch = !strncmp(base, "libtorch_cpu.so", 15);
  if (!is_omp && !is_torch) return 0;
  void* lib = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
  if (!lib) return 0;
  if (is_torch) torch_threads = (OmpQuery)dlsym(lib, "_ZN2at15get_num_threadsEv"); /* int at::get_num_threads() */
  if (is_omp && !gomp_parallel) {
    omp_thread_num = (OmpQuery)dlsym(lib, "omp_get_thread_num");
    omp_max_threads = (OmpQuery)dlsym(lib, "omp_get_max_threads");
    omp_inside = (OmpQuery)dlsym(lib, "omp_in_parallel");
    omp_team_size = (OmpQuery)dlsym(lib, "omp_get_num_threads");
    gomp_parallel = (GompParallel)dlsym(lib, "GOMP_parallel");
    if (gomp_parallel) strncpy(omp_path, name, sizeof omp_path - 1);
  }
  return 0;
}

/* Linux gives a process the registers of x86 matrix units (AMX) only on request; it refuses where there are none. */
static void ask_for_matrix_registers(void) {
#if defined(__x86_64__) && defined(SYS_arch_prctl)
  const long request_permission = 0x1023, tile_data = 18;
  syscall(SYS_arch_prctl, request_permission, tile_data);
#endif
}

/* Finds torch's OpenMP runtime. Returns its path, or "" when kernels will run on the calling thread alone. */
const char* tvm_gdn_launcher_init(void) {
  if (!omp_path[0]) {
    dl_iterate_phdr(visit, 0);
    ask_for_matrix_registers();
    pthread_atfork(0, 0, tvm_gdn_launcher_forked);
  }
  return omp_path;
}

typedef struct {
  ParallelLambda lambda;
  void* cdata;
  TVMParallelGroupEnv env;
  int error;
} Region;

static void run_region(void* data) {
  Region* region = data;
  int step = omp_team_size();
  /* The runtime may grant fewer threads than asked for: every task still runs. */
  for (int task = omp_thread_num(); task < region->env.num_task; task += step)
    if (region->lambda(task, &region->env, region->cdata)) __atomic_store_n(&region->error, 1, __ATOMIC_RELAXED);
}

/* at::get_num_threads also makes torch's setting hold in a thread that never ran a torch operator. */
int tvm_gdn_num_threads(void) {
  if (!gomp_parallel || forked || omp_inside()) return 1;
  return torch_threads ? torch_threads() : omp_max_threads();
}

int tvm_gdn_parallel_launch(ParallelLambda lambda, void* cdata, int num_task) {
  int threads = tvm_gdn_num_threads();
  Region region = {lambda, cdata, {0, num_task > 0 ? num_task : threads}, 0};
  if (threads == 1) {
    for (int task = 0; task < region.env.num_task; ++task)
      if (lambda(task, &region.env, cdata)) region.error = 1;
  } else {
    gomp_parallel(run_region, &region, (unsigned)threads, 0);
  }
  return region.error ? -1 : 0;
}

/* Scratch memory. What a thread gives back it keeps, up to a limit, and hands out again: memory fresh from the system costs a
 * page fault per 4 KiB, as much as the work that a small call does on it. Sizes stand in a table, not in the blocks: looking
 * through blocks that a kernel's data have driven out of the caches took 9 % of a call of the experts. */
enum { HEADER = 64, KEPT_BYTES = 64 << 20, KEPT_BLOCKS = 64, LARGE_PAGE = 2 << 20 };
typedef struct {
  size_t bytes;
  int count;
  size_t capacity[KEPT_BLOCKS];
  char* block[KEPT_BLOCKS];
} Kept;
static pthread_key_t kept_key;
static pthread_once_t kept_once = PTHREAD_ONCE_INIT;

static void drop_kept(void* data) {
  Kept* kept = data;
  for (int i = 0; i < kept->count; ++i) free(kept->block[i]);
  free(kept);
}

static void make_key(void) { pthread_key_create(&kept_key, drop_kept); }

static Kept* kept_of_thread(void) {
  pthread_once(&kept_once, make_key);
  Kept* kept = pthread_getspecific(kept_key);
  if (!kept && (kept = calloc(1, sizeof *kept))) pthread_setspecific(kept_key, kept);
  return kept;
}

/* A block: its capacity in the first HEADER bytes, then what the kernel sees. */
static char* fresh(size_t bytes) {
  void* data = 0;
  size_t whole = HEADER + (bytes ? bytes : HEADER);
  int large = whole >= 2 * (size_t)LARGE_PAGE;
  if (posix_memalign(&data, large ? LARGE_PAGE : HEADER, whole)) return 0;
#ifdef MADV_HUGEPAGE
  if (large) madvise(data, whole / LARGE_PAGE * LARGE_PAGE, MADV_HUGEPAGE);
#endif
  *(size_t*)data = bytes;
  return data;
}

void* tvm_gdn_alloc_workspace(int device_type, int device_id, uint64_t bytes, int dtype_code, int dtype_bits) {
  (void)device_type, (void)device_id, (void)dtype_code, (void)dtype_bits;
  Kept* kept = kept_of_thread();
  int best = -1;
  if (kept)
    for (int i = 0; i < kept->count; ++i)
      if (kept->capacity[i] >= bytes && kept->capacity[i] / 2 <= bytes + 4096 && (best < 0 || kept->capacity[i] < kept->capacity[best]))
        best = i;
  char* block;
  if (best >= 0) {
    block = kept->block[best];
    kept->bytes -= kept->capacity[best];
    --kept->count;
    kept->block[best] = kept->block[kept->count];
    kept->capacity[best] = kept->capacity[kept->count];
  } else {
    block = fresh(bytes);
  }
  return block ? block + HEADER : 0;
}

int tvm_gdn_free_workspace(int device_type, int device_id, void* data) {
  (void)device_type, (void)device_id;
  if (!data) return 0;
  char* block = (char*)data - HEADER;
  size_t capacity = *(size_t*)block;
  Kept* kept = kept_of_thread();
  if (kept && kept->count < KEPT_BLOCKS && kept->bytes + capacity <= KEPT_BYTES) {
    kept->block[kept->count] = block;
    kept->capacity[kept->count++] = capacity;
    kept->bytes += capacity;
  } else {
    free(block);
  }
  return 0;
}
