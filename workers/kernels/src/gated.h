// The gated half of a feed-forward, and what it shares with the experts.
#pragma once
#include <cstdlib>

#include "activation.h"
#include "linear.h"

namespace understudy {

// Memory of the calling thread that is kept from call to call.
struct Workspace {
    char *memory = nullptr;
    std::size_t bytes = 0;
    ~Workspace() { std::free(memory); }
    char *get(std::size_t needed) {
        if (needed > bytes) {
            std::free(memory);
            memory = static_cast<char *>(stream_memory(needed));
            bytes = memory ? needed : 0;
        }
        return memory;
    }
};

}  // namespace understudy
