#include "launcher.h"

const char* graphopt_cuda_error(int code) { return cudaGetErrorString(cudaError_t(code)); }
