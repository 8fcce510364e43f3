// The products of gemm.h as compiled once (parts.cpp): generated kernels that do nothing more to an element call these.
#pragma once
extern "C" {
void wg_call_plain(long M, long N, long K, const float* A, long ar, long ac, const float* B, long ldb, float* C, long ldc, bool add);
void wg_call_panels(long M, long N, long K, const float* A, long ar, long ac, const float* B, float* C, long ldc, bool add);
void wg_call_dots(long M, long N, long K, const float* A, long ar, const float* B, long bc, float* C, long cr, long cc, bool add);
void wg_call_slow(long M, long N, long K, const float* A, long ar, long ac, const float* B, long br, long bc, float* C, long cr, long cc,
                  bool add);
}
