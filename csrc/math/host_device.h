// The formulas in this folder compile for the host and for CUDA devices alike.
//
// On the host each kernel source is compiled once per instruction set, with RK_ISA naming it.
// Everything lives in a namespace of that name, so the linker can never hand the baseline code an
// inline function that was compiled with AVX-512 instructions.
#pragma once

#ifndef RK_ISA
#define RK_ISA baseline
#endif

#ifdef __CUDACC__
#define RK_FORMULA __host__ __device__ __forceinline__
#else
#define RK_FORMULA inline __attribute__((always_inline))
#endif
