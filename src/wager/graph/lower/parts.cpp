// The products that generated kernels share, compiled once for the machine.
#include "parts.h"

#include "gemm.h"

void wg_call_plain(long M, long N, long K, const float* A, long ar, long ac, const float* B, long ldb, float* C, long ldc, bool add) {
    wg_plain<wg_as_is>(M, N, K, A, ar, ac, B, ldb, C, ldc, add);
}
void wg_call_panels(long M, long N, long K, const float* A, long ar, long ac, const float* B, float* C, long ldc, bool add) {
    wg_panels<wg_as_is>(M, N, K, A, ar, ac, B, C, ldc, add);
}
void wg_call_dots(long M, long N, long K, const float* A, long ar, const float* B, long bc, float* C, long cr, long cc, bool add) {
    wg_dots<wg_as_is>(M, N, K, A, ar, B, bc, C, cr, cc, add);
}
void wg_call_slow(long M, long N, long K, const float* A, long ar, long ac, const float* B, long br, long bc, float* C, long cr, long cc,
                  bool add) {
    wg_slow<wg_as_is>(M, N, K, A, ar, ac, B, br, bc, C, cr, cc, add);
}
