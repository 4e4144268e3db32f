/* This library is preloaded before libtorch_cpu.so, and replaces the function by which torch's MKL
 * asks whether Intel made the processor. MKL uses its AVX-512 kernels only if the answer is 1. */

int mkl_serv_intel_cpu_true(void) { return 1; }

/* The agent looks this function up to see whether the library is loaded. */
int flatout_mkl_is_preloaded(void) { return 1; }
