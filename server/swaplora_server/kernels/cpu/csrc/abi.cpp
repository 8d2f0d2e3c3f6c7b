// What Python asks a library that it has loaded: does it have the structures of kernels/cpu/abi.py, and how was it built?
#include <cstring>
#include "abi.h"
#include "products.h"

namespace {

struct Entry {
    const char* name;
    int64_t bytes;
};

#define ENTRY(NAME) {#NAME, sizeof(NAME)}
const Entry ENTRIES[] = {ENTRY(LinearWeight), ENTRY(LinearJob),    ENTRY(Span),         ENTRY(Factors),
                         ENTRY(Segment),      ENTRY(LoraModule),   ENTRY(LayerCache),   ENTRY(Run),
                         ENTRY(DecoderLayer), ENTRY(ReplacedRows), ENTRY(Rows),         ENTRY(Step),
                         ENTRY(NormWeight),   ENTRY(EncoderLayer), ENTRY(ModernLayer),  ENTRY(Router)};
#undef ENTRY

}  // namespace

// The size of the structure `name`, -1 for one that there is not
extern "C" int64_t struct_bytes(const char* name) {
    for (const Entry& entry : ENTRIES)
        if (!std::strcmp(entry.name, name)) return entry.bytes;
    return -1;
}

// How many floats the kernels work on at a time.
extern "C" int64_t lanes() { return LANES; }

// Whether products of bfloat16 are the processor's own.
extern "C" int has_bf16_instruction() { return HAS_BF16_INSTRUCTION; }
