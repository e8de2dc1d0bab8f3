// The whole test framework: count what held, print what did not, end with a status. Checks may be
// made on any thread.
#pragma once

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <sstream>
#include <string>

namespace check {

inline std::atomic<int> held{0};
inline std::atomic<int> broken{0};

inline void report(bool ok, const char* file, int line, const std::string& what) {
  ++(ok ? held : broken);
  if (!ok) std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
}

template <typename A, typename B>
void equal(const A& a, const B& b, const char* file, int line, const char* what) {
  std::ostringstream text;
  text << what << ": " << a << " is not " << b;
  report(a == b, file, line, text.str());
}

// For main() to return. A program that checked nothing has failed.
inline int status() {
  std::printf("%d checks, %d failed\n", held + broken, broken.load());
  return broken == 0 && held > 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

// A fresh directory, removed again at the end.
struct Directory {
  std::string path = (std::filesystem::temp_directory_path() / "offload-test-XXXXXX").string();
  Directory() {
    if (::mkdtemp(path.data()) == nullptr) std::abort();
  }
  ~Directory() { std::filesystem::remove_all(path); }
};

}  // namespace check

#define CHECK(condition) check::report(static_cast<bool>(condition), __FILE__, __LINE__, #condition)
#define CHECK_EQ(a, b) check::equal((a), (b), __FILE__, __LINE__, #a " == " #b)
#define CHECK_THROWS(expression, Exception)                           \
  do {                                                                \
    bool thrown = false;                                              \
    try {                                                             \
      (void)(expression);                                             \
    } catch (const Exception&) {                                      \
      thrown = true;                                                  \
    }                                                                 \
    check::report(thrown, __FILE__, __LINE__, #expression " throws"); \
  } while (false)
