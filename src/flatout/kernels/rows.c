/* Copies rows of several arrays, which have one number of rows, into arrays of the wanted rows.

   Small batches take longer to be asked for than to be copied, so this is one call for all arrays of
   a batch, on one thread. */

#include <stdint.h>
#include <string.h>

/* Returns 0, or -1 if a row is wanted that no array has; then nothing has been written. */
int take_rows(const int64_t *wanted, int64_t count, int64_t rows, int64_t arrays,
              const char *const *sources, char *const *targets, const int64_t *row_bytes) {
    for (int64_t i = 0; i < count; i++)
        if (wanted[i] < 0 || wanted[i] >= rows) return -1;
    for (int64_t array = 0; array < arrays; array++) {
        const int64_t bytes = row_bytes[array];
        const char *source = sources[array];
        char *target = targets[array];
        for (int64_t i = 0; i < count; i++, target += bytes)
            memcpy(target, source + wanted[i] * bytes, (size_t)bytes);
    }
    return 0;
}
