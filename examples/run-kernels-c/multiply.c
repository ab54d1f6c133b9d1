/* A quantized linear layer on an NVIDIA GPU, from `quantkit export CHECKPOINT --to kernels -t sm_90 -o OUT`.
 *
 *   cc -O1 -I OUT/sm_90 multiply.c -lcuda -o multiply
 *   ./multiply OUT LAYER ROWS < x > y
 *
 * x is ROWS x in_features numbers of the export's dtype, raw, in row-major order; y is ROWS x out_features.
 * No CUDA toolkit is needed at run time: only the driver. weights.safetensors is a JSON header, preceded by its
 * length in 8 bytes, and the tensors' bytes; the header is quantkit's own, so looking for a name in it will do.
 */
#include "quantkit_kernels.h"

#define CHECK(call)                                                        \
  do {                                                                     \
    CUresult error_ = (call);                                              \
    if (error_ != CUDA_SUCCESS) {                                          \
      const char *text_ = "?";                                             \
      cuGetErrorString(error_, &text_);                                    \
      fprintf(stderr, "%s: %s\n", #call, text_);                           \
      return 1;                                                            \
    }                                                                      \
  } while (0)

/* Device copy of the tensor LAYER.PART; 0 when the layer has none of that name, -1 on an error. */
static int tensor_to_device(FILE *file, const char *layer, const char *part, CUdeviceptr *out) {
  unsigned long long length = 0, begin = 0, end = 0;
  char name[1024];
  *out = 0;
  rewind(file);
  if (fread(&length, 8, 1, file) != 1) return -1;
  char *header = malloc(length + 1);
  if (!header || fread(header, 1, length, file) != length) return -1;
  header[length] = 0;
  snprintf(name, sizeof name, "\"%s.%s\":{", layer, part);
  const char *entry = strstr(header, name);
  const char *offsets = entry ? strstr(entry, "\"data_offsets\":[") : NULL;
  int found = offsets && sscanf(offsets, "\"data_offsets\":[%llu,%llu", &begin, &end) == 2;
  free(header);
  if (!found) return 0;
  void *bytes = malloc(end - begin);
  fseek(file, (long)(8 + length + begin), SEEK_SET);
  if (!bytes || fread(bytes, 1, end - begin, file) != end - begin) return -1;
  if (cuMemAlloc(out, end - begin) || cuMemcpyHtoD(*out, bytes, end - begin)) return -1;
  free(bytes);
  return 1;
}

int main(int argc, char **argv) {
  if (argc != 4) {
    fprintf(stderr, "usage: multiply OUT LAYER ROWS < x > y\n");
    return 2;
  }
  const int layer = qk_find_layer(argv[2]), rows = atoi(argv[3]);
  if (layer < 0 || rows < 1) {
    fprintf(stderr, "no layer %s, or no rows\n", argv[2]);
    return 2;
  }
  CUdevice device;
  CUcontext context;
  CHECK(cuInit(0));
  CHECK(cuDeviceGet(&device, 0));
  CHECK(cuDevicePrimaryCtxRetain(&context, device));
  CHECK(cuCtxSetCurrent(context));

  qk_kernels kernels;
  CHECK(qk_load(&kernels, argv[1]));

  char path[4096];
  snprintf(path, sizeof path, "%s/weights.safetensors", argv[1]);
  FILE *file = fopen(path, "rb");
  qk_weight weight;
  struct { const char *name; CUdeviceptr *at; } parts[] = {
      {"codes", &weight.codes}, {"scale", &weight.scale}, {"zero", &weight.zero}, {"lut", &weight.lut},
      {"perm", &weight.perm}, {"input_scale", &weight.input_scale}, {"bias", &weight.bias}};
  for (size_t i = 0; file && i < sizeof parts / sizeof *parts; ++i)
    if (tensor_to_device(file, argv[2], parts[i].name, parts[i].at) < 0) file = NULL;
  if (!file) {
    fprintf(stderr, "%s cannot be read\n", path);
    return 1;
  }

  const size_t in_bytes = (size_t)rows * qk_layers[layer].in_features * QK_ELEMENT;
  const size_t out_bytes = (size_t)rows * qk_layers[layer].out_features * QK_ELEMENT;
  const size_t scratch_bytes = qk_scratch(layer, rows);
  void *x = malloc(in_bytes), *y = malloc(out_bytes);
  if (fread(x, 1, in_bytes, stdin) != in_bytes) {
    fprintf(stderr, "x is shorter than %zu bytes\n", in_bytes);
    return 1;
  }
  CUdeviceptr dx, dy, scratch = 0;
  CHECK(cuMemAlloc(&dx, in_bytes));
  CHECK(cuMemAlloc(&dy, out_bytes));
  if (scratch_bytes) CHECK(cuMemAlloc(&scratch, scratch_bytes));
  CHECK(cuMemcpyHtoD(dx, x, in_bytes));

  CHECK(qk_linear(&kernels, NULL, layer, rows, dx, &weight, dy, scratch));
  CHECK(cuCtxSynchronize());

  CHECK(cuMemcpyDtoH(y, dy, out_bytes));
  fwrite(y, 1, out_bytes, stdout);
  qk_unload(&kernels);
  return 0;
}
