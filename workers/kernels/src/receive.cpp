// Values of a RESP 2 reply, received straight to where they stay: `workers/cache/wire.py` says what and why.
//
// One foreign call takes a whole reply, so that the interpreter is free for the engine's thread meanwhile.

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <sys/types.h>

#if defined(_WIN32)
#include <winsock2.h>
#else
#include <sys/socket.h>
#endif

namespace {

enum { CLOSED = -1, SILENT = -2, BROKEN = -3, NO_REPLY = -4 };
enum { OK = 1, MISSING = 0, WRONG_SIZE = -1 };

// What was read and not yet used: bytes [begin, end) of `data`, which holds `size`.
struct Buffer {
  int socket;
  char *data;
  long size, begin, end;
};

long receive(const Buffer &in, char *place, long most) {
  for (;;) {
    const ssize_t count = recv(in.socket, place, most, 0);
    if (count > 0) return count;
    if (count == 0) return CLOSED;
    if (errno == EINTR) continue;
    return errno == EAGAIN || errno == EWOULDBLOCK ? SILENT : BROKEN;
  }
}

// The size that a line says, "$SIZE\r\n", into `found`; 0, or what went wrong.
long read_size(Buffer &in, long &found) {
  for (;;) {
    char *from = in.data + in.begin;
    const auto at = static_cast<char *>(std::memchr(from, '\n', in.end - in.begin));
    if (at) {
      char *last = nullptr;
      found = std::strtol(from + 1, &last, 10);
      if (*from != '$' || last != at - 1 || *last != '\r' || last == from + 1) return NO_REPLY;  // not used: it is told
      in.begin = at + 1 - in.data;
      return 0;
    }
    std::memmove(in.data, from, in.end - in.begin);
    in.end -= in.begin;
    in.begin = 0;
    if (in.end == in.size) return NO_REPLY;
    const long count = receive(in, in.data + in.end, in.size - in.end);
    if (count < 0) return count;
    in.end += count;
  }
}

long fill(Buffer &in, char *place, long size) {
  long at = in.end - in.begin < size ? in.end - in.begin : size;
  std::memcpy(place, in.data + in.begin, at);
  in.begin += at;
  while (at < size) {
    const long count = receive(in, place + at, size - at);
    if (count < 0) return count;
    at += count;
  }
  return 0;
}

long skip(Buffer &in, long size) {
  char scratch[1 << 14];
  while (size > 0) {
    const long part = size < long(sizeof scratch) ? size : long(sizeof scratch);
    if (const long wrong = fill(in, scratch, part)) return wrong;
    size -= part;
  }
  return 0;
}

}  // namespace

extern "C" {

// `count` values, each into its place if it has that size; what became of each into `states`. 0, or what went wrong:
// the connection is of no more use then.
long understudy_receive_values(Buffer *in, char *const *places, const long *sizes, int *states, long count) {
  for (long i = 0; i < count; ++i) {
    long size = 0;
    if (const long wrong = read_size(*in, size)) return wrong;
    if (size < 0) {
      states[i] = MISSING;
      continue;
    }
    const bool fits = size == sizes[i];
    if (fits)
      if (const long wrong = fill(*in, places[i], size)) return wrong;
    if (const long wrong = skip(*in, fits ? 2 : size + 2)) return wrong;
    states[i] = fits ? OK : WRONG_SIZE;
  }
  return 0;
}
}
