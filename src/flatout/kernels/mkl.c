/* Preloaded before libtorch_cpu.so, whose MKL asks this of itself before it picks its kernels: on
 * another vendor's processor the answer 0 keeps it from AVX-512. */

int mkl_serv_intel_cpu_true(void) { return 1; }

/* By this the agent knows that the library is there. */
int flatout_mkl_is_preloaded(void) { return 1; }
