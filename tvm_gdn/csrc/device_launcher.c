/* Loads device images and launches their kernels through a driver's C API, on the caller's current stream.
 *
 * TVM's host code finds a kernel through a function pointer of its own library, `__TVMFFIEnvModLookupFromImports`; `load.py`
 * points it here, so that a pack needs tvm_ffi and the device's driver, and nothing of TVM's runtime. Which driver that is, and
 * how its functions are called, comes with the pack (`[driver]` of the target's file). An emulation is a driver too.
 *
 * A context of the image is made per device when a kernel is first launched there. Nothing here waits for the device.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_DEVICES = 64, MAX_PARAMETERS = 128, MAX_HELD = 64, DIMS = 6, ATTRIBUTE_DYNAMIC_SHARED = 8, CAPTURE_RELAXED = 2, LAUNCH_EARLY = 6 };

/* The parts of tvm_ffi's C ABI that are used; defined by libtvm_ffi, which is loaded already. */
typedef struct {
  int32_t type_index;
  uint32_t padding;
  union {
    int64_t i;
    double f;
    void* p;
  } v;
} Any;
extern int TVMFFIFunctionCreate(void* self, int (*call)(void*, const Any*, int32_t, Any*), void (*deleter)(void*), void** out);
extern void* TVMFFIEnvGetStream(int32_t device_type, int32_t device_id);
extern void TVMFFIErrorSetRaisedFromCStr(const char* kind, const char* message);
typedef struct {
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
} Tensor; /* DLTensor */
enum { OBJECT_HEADER = 24, UINT = 1 };
extern int TVMFFIEnvTensorAlloc(Tensor* prototype, void** out);
extern int TVMFFIObjectDecRef(void* object);

/* What cuLaunchKernelEx takes. */
typedef struct {
  int id, padding, value[16];
} Attribute;
typedef struct {
  unsigned dims[6], shared;
  void* stream;
  Attribute* attributes;
  unsigned count;
} Launch;

typedef struct {
  int (*init)(unsigned);
  int (*device_get)(int*, int);
  int (*context_retain)(void**, int);
  int (*context_current)(void**);
  int (*context_push)(void*);
  int (*context_pop)(void**);
  int (*load)(void**, const void*);
  int (*function)(void**, void*, const char*);
  int (*attribute)(void*, int, int);
  int (*exchange_capture)(int*);
  int (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
  int (*launch_with)(const Launch*, void*, void**, void**);
  int (*error_name)(int, const char**);
} Driver;

typedef struct Image Image;
typedef struct Kernel {
  struct Kernel* next;
  Image* image;
  char name[256];
  char parameters[MAX_PARAMETERS + 1]; /* one letter each: p pointer, l int64, i int32, s int16, b int8, f float32, d float64 */
  int count;
  int tags[DIMS + 1]; /* which launch dimension each extra argument is; DIMS = bytes of dynamic shared memory */
  int tag_count;
  int early; /* may begin before the kernel ahead of it ends: it waits itself */
  void* handle; /* tvm_ffi function */
  void* functions[MAX_DEVICES];
  int shared[MAX_DEVICES];
} Kernel;
struct Image {
  Image* next;
  void* library;
  Driver driver;
  void* data;
  Kernel* kernels;
  void* modules[MAX_DEVICES];
  void* contexts[MAX_DEVICES];
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Image* images;
static __thread int device_type, device_id;
static __thread char message[1024];
static void* set_device;

static int raise_error(const Image* image, const char* what, const char* name, int status) {
  const char* text = 0;
  if (image && image->driver.error_name) image->driver.error_name(status, &text);
  snprintf(message, sizeof message, "%s %s: the driver answered %d%s%s%s", what, name, status, text ? " (" : "", text ? text : "", text ? ")" : "");
  TVMFFIErrorSetRaisedFromCStr("RuntimeError", message);
  return -1;
}

static int on_set_device(void* self, const Any* args, int32_t count, Any* result) {
  (void)self, (void)result;
  if (count >= 2) device_type = (int)args[0].v.i, device_id = (int)args[1].v.i;
  return 0;
}

/* Makes the image and a kernel's function on a device; `lock` is held. */
static int prepare(Kernel* kernel, int id) {
  Image* image = kernel->image;
  Driver* driver = &image->driver;
  int status = 0, device = 0, mode = CAPTURE_RELAXED;
  if (!image->contexts[id]) {
    if ((status = driver->init(0))) return raise_error(image, "starting the driver for", kernel->name, status);
    if ((status = driver->device_get(&device, id)) || (status = driver->context_retain(&image->contexts[id], device)))
      return raise_error(image, "opening the device for", kernel->name, status);
  }
  void *before = 0, *popped = 0;
  driver->context_current(&before);
  if (before != image->contexts[id] && (status = driver->context_push(image->contexts[id])))
    return raise_error(image, "entering the device for", kernel->name, status);
  /* While a graph is captured, loading a module is allowed only to a thread that says it knows what it does. */
  if (driver->exchange_capture) driver->exchange_capture(&mode);
  if (!image->modules[id]) status = driver->load(&image->modules[id], image->data);
  if (!status) status = driver->function(&kernel->functions[id], image->modules[id], kernel->name);
  if (driver->exchange_capture) driver->exchange_capture(&mode);
  if (before != image->contexts[id]) driver->context_pop(&popped);
  return status ? raise_error(image, "loading", kernel->name, status) : 0;
}

static int on_launch(void* self, const Any* args, int32_t count, Any* result) {
  (void)result;
  Kernel* kernel = self;
  Image* image = kernel->image;
  Driver* driver = &image->driver;
  int id = device_id, status;
  if (count != kernel->count + kernel->tag_count || id < 0 || id >= MAX_DEVICES)
    return raise_error(image, "launching (arguments or device out of range)", kernel->name, -1);
  uint64_t values[MAX_PARAMETERS];
  void* parameters[MAX_PARAMETERS];
  for (int n = 0; n < kernel->count; ++n) {
    parameters[n] = &values[n];
    values[n] = (uint64_t)args[n].v.i; /* little-endian: narrower integers are its first bytes */
    if (kernel->parameters[n] == 'f') {
      float narrow = (float)args[n].v.f;
      memcpy(&values[n], &narrow, sizeof narrow);
    }
  }
  uint64_t dims[DIMS + 1] = {1, 1, 1, 1, 1, 1, 0};
  for (int n = 0; n < kernel->tag_count; ++n) dims[kernel->tags[n]] = (uint64_t)args[kernel->count + n].v.i;
  for (int n = 0; n < DIMS; ++n)
    if (!dims[n]) return 0; /* nothing to do: no tokens, no sequences */
  if (!__atomic_load_n(&kernel->functions[id], __ATOMIC_ACQUIRE)) {
    pthread_mutex_lock(&lock);
    status = kernel->functions[id] ? 0 : prepare(kernel, id);
    pthread_mutex_unlock(&lock);
    if (status) return status;
  }
  void *before = 0, *popped = 0;
  driver->context_current(&before);
  int foreign = before != image->contexts[id];
  if (foreign && (status = driver->context_push(image->contexts[id])))
    return raise_error(image, "entering the device for", kernel->name, status);
  int bytes = (int)dims[DIMS];
  status = 0;
  /* Whatever its size: a kernel's static memory counts towards the 48 KiB that need no asking, and is not known here. */
  if (bytes > kernel->shared[id] && driver->attribute) {
    status = driver->attribute(kernel->functions[id], ATTRIBUTE_DYNAMIC_SHARED, bytes);
    if (!status) kernel->shared[id] = bytes;
  }
  void* stream = TVMFFIEnvGetStream(device_type, id);
  if (!status && kernel->early && driver->launch_with) {
    Attribute early = {.id = LAUNCH_EARLY, .value = {1}};
    Launch config = {.shared = (unsigned)bytes, .stream = stream, .attributes = &early, .count = 1};
    for (int n = 0; n < DIMS; ++n) config.dims[n] = (unsigned)dims[n];
    status = driver->launch_with(&config, kernel->functions[id], parameters, 0);
  } else if (!status) {
    status = driver->launch(kernel->functions[id], (unsigned)dims[0], (unsigned)dims[1], (unsigned)dims[2], (unsigned)dims[3],
                            (unsigned)dims[4], (unsigned)dims[5], (unsigned)bytes, stream, parameters, 0);
  }
  if (foreign) driver->context_pop(&popped);
  return status ? raise_error(image, "launching", kernel->name, status) : 0;
}

/* Scratch memory: tensors of the caller's framework, its allocations on its current stream, which tvm_ffi asks for. */
static __thread struct {
  void *address, *tensor;
} held[MAX_HELD]; /* what calls in progress on this thread hold */
static __thread int held_count;

/* Null where there is none; the framework's error is then set. */
void* tvm_gdn_device_allocate(int type, int id, uint64_t bytes, int code, int bits) {
  (void)code, (void)bits;
  int64_t shape = bytes ? (int64_t)bytes : 1;
  Tensor wanted = {.device = {type, id}, .ndim = 1, .code = UINT, .bits = 8, .lanes = 1, .shape = &shape};
  void* object = 0;
  if (held_count == MAX_HELD) return raise_error(0, "allocating", "scratch memory (more buffers than a call may have)", -1), (void*)0;
  if (TVMFFIEnvTensorAlloc(&wanted, &object)) return 0;
  const Tensor* made = (const Tensor*)((char*)object + OBJECT_HEADER);
  held[held_count].address = (char*)made->data + made->byte_offset;
  held[held_count].tensor = object;
  return held[held_count++].address;
}

int tvm_gdn_device_give_back(int type, int id, void* address) {
  (void)type, (void)id;
  for (int n = held_count - 1; n >= 0; --n) {
    if (held[n].address != address) continue;
    void* object = held[n].tensor;
    held[n] = held[--held_count];
    return TVMFFIObjectDecRef(object);
  }
  return 0;
}

/* What `__TVMFFIEnvModLookupFromImports` of a device pack's libraries points to. The context is a library's own. */
int tvm_gdn_device_lookup(void* library, const char* name, void** out) {
  int status = -1;
  pthread_mutex_lock(&lock);
  if (!strcmp(name, "__tvm_set_device")) {
    status = set_device ? 0 : TVMFFIFunctionCreate(0, on_set_device, 0, &set_device);
    *out = set_device;
  } else {
    Image* image = images;
    while (image && image->library != library) image = image->next;
    Kernel* kernel = image ? image->kernels : 0;
    while (kernel && strcmp(kernel->name, name)) kernel = kernel->next;
    if (kernel) {
      status = kernel->handle ? 0 : TVMFFIFunctionCreate(kernel, on_launch, 0, &kernel->handle);
      *out = kernel->handle;
    } else {
      raise_error(0, "looking up", name, -1);
    }
  }
  pthread_mutex_unlock(&lock);
  return status;
}

static void* symbol(void* driver, const char* prefix, const char* name) {
  char text[128];
  /* Functions whose ABI changed have a second name; the first still has the old ABI. */
  snprintf(text, sizeof text, "%s%s_v2", prefix, name);
  void* found = dlsym(driver, text);
  if (found) return found;
  snprintf(text, sizeof text, "%s%s", prefix, name);
  return dlsym(driver, text);
}

/* One line of the table: name, a letter per parameter (or -), launch dimensions 0 to 6 of the further arguments, + for "early". */
static Kernel* parse(Image* image, const char* line) {
  static const char letters[] = "plisbfd";
  char tags[16] = "";
  Kernel* kernel = calloc(1, sizeof *kernel);
  if (!kernel) return 0;
  if (sscanf(line, "%255s %128s %15s", kernel->name, kernel->parameters, tags) != 3) return free(kernel), (Kernel*)0;
  if (!strcmp(kernel->parameters, "-")) kernel->parameters[0] = 0;
  kernel->count = (int)strlen(kernel->parameters);
  kernel->tag_count = (int)strcspn(tags, "+");
  kernel->early = tags[kernel->tag_count] == '+';
  int sound = kernel->tag_count <= DIMS + 1 && strspn(kernel->parameters, letters) == (size_t)kernel->count;
  for (int n = 0; sound && n < kernel->tag_count; ++n) {
    kernel->tags[n] = tags[n] - '0';
    sound = kernel->tags[n] >= 0 && kernel->tags[n] <= DIMS;
  }
  if (!sound) return free(kernel), (Kernel*)0;
  kernel->image = image;
  return kernel;
}

/* Registers the image that a library's kernels are in.
 *
 * library: the library's own context; driver: file of the driver, prefix of its functions, names of its launch and error-name
 * functions; data: the image; table: its kernels, one per line; load and function: what is called in place of the driver's own
 * ModuleLoadData and ModuleGetFunction, or 0. Returns 0, or what is wrong.
 */
const char* tvm_gdn_device_open(void* library, const char* file, const char* prefix, const char* launch, const char* error_name,
                                const void* data, uint64_t size, const char* table, int (*load)(void**, const void*),
                                int (*function)(void**, void*, const char*)) {
  void* driver = dlopen(file, RTLD_NOW | RTLD_LOCAL);
  if (!driver) {
    snprintf(message, sizeof message, "the driver cannot be loaded: %s", dlerror());
    return message;
  }
  Image* image = calloc(1, sizeof *image);
  if (!image || !(image->data = malloc(size + 1))) return "out of memory";
  memcpy(image->data, data, size);
  ((char*)image->data)[size] = 0;
  image->library = library;
  Driver* found = &image->driver;
  const struct {
    void* where;
    const char* name;
  } needed[] = {
      {&found->init, "Init"}, {&found->device_get, "DeviceGet"}, {&found->context_retain, "DevicePrimaryCtxRetain"},
      {&found->context_current, "CtxGetCurrent"}, {&found->context_push, "CtxPushCurrent"}, {&found->context_pop, "CtxPopCurrent"},
      {&found->load, "ModuleLoadData"}, {&found->function, "ModuleGetFunction"},
  };
  for (unsigned n = 0; n < sizeof needed / sizeof *needed; ++n) {
    void* address = symbol(driver, prefix, needed[n].name);
    if (!address) {
      snprintf(message, sizeof message, "%s has no function %s%s", file, prefix, needed[n].name);
      return message;
    }
    memcpy(needed[n].where, &address, sizeof address);
  }
  if (load && function) found->load = load, found->function = function;
  void* address = dlsym(driver, launch);
  if (!address) {
    snprintf(message, sizeof message, "%s has no function %s", file, launch);
    return message;
  }
  memcpy(&found->launch, &address, sizeof address);
  address = dlsym(driver, error_name);
  memcpy(&found->error_name, &address, sizeof address);
  /* HIP's takes a host function, not a module's; its devices give a block all the shared memory there is without asking. */
  address = load ? 0 : symbol(driver, prefix, "FuncSetAttribute");
  memcpy(&found->attribute, &address, sizeof address);
  address = symbol(driver, prefix, "LaunchKernelEx");
  memcpy(&found->launch_with, &address, sizeof address);
  address = symbol(driver, prefix, "ThreadExchangeStreamCaptureMode");
  memcpy(&found->exchange_capture, &address, sizeof address);
  char* copy = strdup(table);
  for (char *state = 0, *line = strtok_r(copy, "\n", &state); line; line = strtok_r(0, "\n", &state)) {
    Kernel* kernel = parse(image, line);
    if (!kernel) return "its table of kernels is damaged";
    kernel->next = image->kernels;
    image->kernels = kernel;
  }
  free(copy);
  pthread_mutex_lock(&lock);
  image->next = images;
  images = image;
  pthread_mutex_unlock(&lock);
  return 0;
}
