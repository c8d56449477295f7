// GCC 11 and later call this function wherever a container allocates; the libstdc++ of older systems does not have it.
// With one of our own the library loads wherever ONNX Runtime's builds do, whichever GCC compiled it.
#include <new>

#ifdef __GLIBCXX__
namespace std {
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std
#endif
