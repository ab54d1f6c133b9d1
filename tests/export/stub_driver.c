/* A CUDA driver without a GPU: allocates host memory and writes every call to $QK_STUB_LOG.
 *
 * A launch is logged with the values of its parameters, whose number and sizes are read from the loaded
 * cubin's own .nv.info section, as the real driver does: too few or too many arguments would show. */
#include <cuda.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#undef cuMemAlloc
#undef cuMemcpyHtoD
#undef cuMemcpyDtoH

typedef struct {
  char symbol[128];
  int count;
  unsigned short sizes[64];
  const unsigned char *image;
} kernel;

static void note(const char *format, ...) {
  FILE *log = fopen(getenv("QK_STUB_LOG"), "a");
  va_list list;
  va_start(list, format);
  vfprintf(log, format, list);
  va_end(list);
  fclose(log);
}

static unsigned long long number(const unsigned char *at, int bytes) {
  unsigned long long value = 0;
  memcpy(&value, at, (size_t)bytes);
  return value;
}

/* Sizes of the parameters of `symbol`, from section .nv.info.<symbol>. */
static int read_parameters(kernel *k) {
  const unsigned char *image = k->image, *heads = image + number(image + 40, 8);
  const int size = (int)number(image + 58, 2), count = (int)number(image + 60, 2);
  const unsigned char *names = image + number(heads + number(image + 62, 2) * size + 24, 8);
  char wanted[160];
  snprintf(wanted, sizeof wanted, ".nv.info.%s", k->symbol);
  for (int i = 0; i < count; ++i) {
    const unsigned char *head = heads + i * size;
    if (strcmp((const char *)names + number(head, 4), wanted)) continue;
    const unsigned char *at = image + number(head + 24, 8), *end = at + number(head + 32, 8);
    while (at + 4 <= end) {
      if (at[0] == 4 && at[1] == 0x17) {
        const int ordinal = (int)number(at + 8, 2);
        k->sizes[ordinal] = (unsigned short)(number(at + 12, 4) >> 18);
        if (ordinal >= k->count) k->count = ordinal + 1;
      }
      at += at[0] == 4 ? 4 + number(at + 2, 2) : 4;
    }
    return 1;
  }
  return 0;
}

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { *c = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext c) { return CUDA_SUCCESS; }
CUresult cuCtxSynchronize(void) { return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult e, const char **text) { *text = "stub error"; return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule m) { return CUDA_SUCCESS; }

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  if (memcmp(image, "\177ELF", 4)) return CUDA_ERROR_INVALID_IMAGE;
  const unsigned char *bytes = image;
  const size_t size = number(bytes + 40, 8) + number(bytes + 58, 2) * number(bytes + 60, 2);
  unsigned char *copy = malloc(size); /* the caller may free its own */
  memcpy(copy, image, size);
  *module = (CUmodule)copy;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *symbol) {
  kernel *k = calloc(1, sizeof *k);
  snprintf(k->symbol, sizeof k->symbol, "%s", symbol);
  k->image = (const unsigned char *)module;
  if (!read_parameters(k)) return CUDA_ERROR_NOT_FOUND;
  *function = (CUfunction)k;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  note("attribute %s %d %d\n", ((kernel *)function)->symbol, (int)attribute, value);
  return CUDA_SUCCESS;
}

CUresult cuMemAlloc_v2(CUdeviceptr *out, size_t size) {
  void *memory = NULL;
  if (posix_memalign(&memory, 256, size)) return CUDA_ERROR_OUT_OF_MEMORY;
  *out = (CUdeviceptr)memory;
  note("alloc %llx %zu\n", (unsigned long long)*out, size);
  return CUDA_SUCCESS;
}
CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t n) { memcpy((void *)to, from, n); return CUDA_SUCCESS; }
CUresult cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t n) { memcpy(to, (void *)from, n); return CUDA_SUCCESS; }

CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                        unsigned bz, unsigned shared, CUstream stream, void **parameters, void **extra) {
  kernel *k = (kernel *)function;
  char line[4096];
  int at = snprintf(line, sizeof line, "launch %s %u %u %u %u %u :", k->symbol, gx, gy, gz, bx, shared);
  for (int i = 0; i < k->count; ++i)
    at += snprintf(line + at, sizeof line - (size_t)at, " %d:%llx", k->sizes[i], number(parameters[i], k->sizes[i]));
  note("%s\n", line);
  return CUDA_SUCCESS;
}
