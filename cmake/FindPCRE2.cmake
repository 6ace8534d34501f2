# Debian's libpcre2-dev ships no CMake package: this defines PCRE2::8BIT, the library for text in bytes.
find_path(PCRE2_INCLUDE_DIR pcre2.h)
find_library(PCRE2_8BIT_LIBRARY pcre2-8)
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(PCRE2
  REQUIRED_VARS PCRE2_8BIT_LIBRARY PCRE2_INCLUDE_DIR
  REASON_FAILURE_MESSAGE "Install libpcre2-dev, or run tools/setup.")
if(PCRE2_FOUND AND NOT TARGET PCRE2::8BIT)
  add_library(PCRE2::8BIT INTERFACE IMPORTED)
  target_include_directories(PCRE2::8BIT INTERFACE ${PCRE2_INCLUDE_DIR})
  target_link_libraries(PCRE2::8BIT INTERFACE ${PCRE2_8BIT_LIBRARY})
endif()
mark_as_advanced(PCRE2_INCLUDE_DIR PCRE2_8BIT_LIBRARY)
