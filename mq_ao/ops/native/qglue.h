// What the PyTorch registrations on 8-bit operands share.
#pragma once

#include "glue.h"
#include "qrows.h"

namespace mq_ao {

inline bool is_signed(const Tensor& t) { return t.scalar_type() == at::kChar; }
inline bool is_byte(const Tensor& t) { return t.scalar_type() == at::kByte || is_signed(t); }

// As `rows`, for uint8 and int8, which cores take for uint8.
inline Rows<const uint8_t> byte_rows(const Tensor& t) {
  return {static_cast<const uint8_t*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.dim() == 4 ? t.stride(2) : 0};
}

}  // namespace mq_ao
