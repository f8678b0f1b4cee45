/* input_fault.c - the texts of row faults, apart from the readers: the builder needs them where no reader is linked. */
#include "input.h"

const char *input_fault_text(input_fault f) {
  switch (f) {
  case INPUT_FINE: return "fine";
  case INPUT_NAN: return "NaN or Inf in the vector";
  case INPUT_OVERFLOW: return "a float64 value does not fit float32";
  case INPUT_DIM: return "the vector has another length than the rest";
  case INPUT_ID_UTF8: return "the id is not valid UTF-8 or has an embedded NUL";
  case INPUT_HOLE: return "never written: the file holds no data for this row";
  }
  return "unknown fault";
}
