// All kernels for one instruction set: compiled once for each, with MG_LEVEL its namespace.
//
// Only code of this namespace may be emitted here. A function that the linker merges between
// translation units (an inline one of a standard header, say) could end up compiled for
// instructions that the machine lacks, so no standard header with code in it is included.
#include "linear_simd.h"
#include "simd.h"
#include "simd_math.h"
#include "table.h"

#include "norm.inc"
#include "activation.inc"
#include "vocabulary.inc"
#include "kv_cache.inc"
#include "attention.inc"
#include "qkv.inc"
#include "linear_prepare.inc"
#include "linear.inc"
#include "roofline.inc"

namespace mg::MG_LEVEL {

extern const Table level_table;
const Table level_table = {
    rms_norm,
    qkv,
    attend,
    merge,
    layer_norm,
    activation,
    embed,
    find_largest_rows,
    find_top_rows,
    linear_prepare,
    linear_multiply,
    pack_units,
    read_memory,
    peak,
};

}  // namespace mg::MG_LEVEL
