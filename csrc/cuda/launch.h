// Starting a kernel on the caller's stream; what goes wrong becomes an exception.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include <stdexcept>
#include <string>

#include "cuda/block.h"

namespace rk {
namespace cuda {

// The arguments are converted as in an ordinary call. Without blocks nothing is launched.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, void* stream,
            const Arguments&... arguments) {
  if (blocks == 0) return;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  if (error == cudaSuccess) error = cudaGetLastError();
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that the next launch does not report this one again
  throw std::runtime_error(std::string("the CUDA kernel '") + name +
                           "' could not be launched: " + cudaGetErrorString(error));
}

}  // namespace cuda
}  // namespace rk
