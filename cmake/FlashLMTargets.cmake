# What every FlashLM target has in common, as two functions instead of global flags.

# flashlm_target(TARGET): C++20, includes spelled from the root, warnings as errors, sanitizers when asked for.
function(flashlm_target target)
  target_compile_features(${target} PUBLIC cxx_std_20)
  target_include_directories(${target} PUBLIC $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}> $<INSTALL_INTERFACE:include/flashlm>)
  # -fPIC everywhere, programs too, so that one precompiled header serves all targets.
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wshadow -Werror -fPIC)
  if(FLASHLM_SANITIZE)
    target_compile_options(${target} PRIVATE -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer)
    target_link_options(${target} PUBLIC -fsanitize=address,undefined)
  endif()
endfunction()

# flashlm_add_torch_pch(): torch/torch.h costs 25 s and 1.3 GB a source; compiled once, 4 s.
function(flashlm_add_torch_pch)
  file(WRITE ${CMAKE_BINARY_DIR}/torch_pch.cpp "")
  add_library(flashlm_torch_pch OBJECT ${CMAKE_BINARY_DIR}/torch_pch.cpp)
  target_link_libraries(flashlm_torch_pch PRIVATE torch OpenMP::OpenMP_CXX)
  flashlm_target(flashlm_torch_pch)
  target_precompile_headers(flashlm_torch_pch PRIVATE <torch/torch.h>)
endfunction()

# flashlm_torch_target(TARGET): a FlashLM target that uses LibTorch, through the shared precompiled header.
# OpenMP: at::parallel_for compiled without it silently runs on one thread.
function(flashlm_torch_target target)
  flashlm_target(${target})
  target_link_libraries(${target} PUBLIC torch PRIVATE OpenMP::OpenMP_CXX)
  target_precompile_headers(${target} REUSE_FROM flashlm_torch_pch)
  # Lets ccache's look at a source skip the precompiled header too, instead of preprocessing all of Torch.
  target_compile_options(${target} PRIVATE $<$<CXX_COMPILER_ID:GNU>:-fpch-preprocess>)
endfunction()

# flashlm_link_at_root(TARGET): after each build, ./TARGET in the source folder is the program built last.
function(flashlm_link_at_root target)
  add_custom_command(TARGET ${target} POST_BUILD
    COMMAND ${CMAKE_COMMAND} -E create_symlink $<TARGET_FILE:${target}> ${PROJECT_SOURCE_DIR}/${target})
endfunction()

# flashlm_cross_compile_catch2(): Catch2::Catch2WithMain for another processor. Catch2 2.13 is one header: the host's
# will do, but in a folder of its own, because the rest of /usr/include will not.
function(flashlm_cross_compile_catch2)
  find_path(CATCH2_HEADER_DIR catch.hpp PATH_SUFFIXES catch2 REQUIRED NO_CMAKE_FIND_ROOT_PATH)
  set(folder ${CMAKE_BINARY_DIR}/catch2)
  file(CONFIGURE OUTPUT ${folder}/main.cpp CONTENT "#define CATCH_CONFIG_MAIN\n#include <catch2/catch.hpp>\n")
  file(MAKE_DIRECTORY ${folder}/include)
  file(CREATE_LINK ${CATCH2_HEADER_DIR} ${folder}/include/catch2 SYMBOLIC)
  add_library(flashlm_catch2 STATIC ${folder}/main.cpp)
  target_include_directories(flashlm_catch2 SYSTEM PUBLIC ${folder}/include)
  add_library(Catch2::Catch2WithMain ALIAS flashlm_catch2)
endfunction()

# flashlm_test(NAME SOURCE... [LIBS TARGET...]): one Catch2 executable, one ctest entry of the same name.
function(flashlm_test name)
  cmake_parse_arguments(ARG "" "" "LIBS" ${ARGN})
  add_executable(${name} ${ARG_UNPARSED_ARGUMENTS})
  target_link_libraries(${name} PRIVATE ${ARG_LIBS} Catch2::Catch2WithMain)
  flashlm_target(${name})
  add_test(NAME ${name} COMMAND ${name})
endfunction()
