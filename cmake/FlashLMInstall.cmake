# `cmake --install build/release --prefix DIR`: programs in bin, libraries in lib, public headers in include/flashlm,
# and the CMake package FlashLM, whose targets are FlashLM::<folder>. tests/consumer is a project that uses it.
include(CMakePackageConfigHelpers)
set(FLASHLM_PACKAGE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/FlashLM)

# flashlm_install_library(TARGET FOLDER [PRIVATE_HEADER...]): the library as FlashLM::FOLDER, found beside other libraries and
# LibTorch at run time. Public headers are the others with a source of the same name in the library, and FOLDER/FOLDER.h.
function(flashlm_install_library target folder)
  set_target_properties(${target} PROPERTIES
    EXPORT_NAME ${folder} INSTALL_RPATH "$ORIGIN" INSTALL_RPATH_USE_LINK_PATH ON)
  install(TARGETS ${target} EXPORT FlashLMTargets)
  get_target_property(headers ${target} SOURCES)
  list(TRANSFORM headers REPLACE "\\.cpp$" ".h")
  list(REMOVE_ITEM headers ${ARGN})
  foreach(header IN LISTS headers ITEMS ${folder}.h)
    if(EXISTS ${PROJECT_SOURCE_DIR}/${folder}/${header})
      install(FILES ${PROJECT_SOURCE_DIR}/${folder}/${header} DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/flashlm/${folder})
    endif()
  endforeach()
endfunction()

# flashlm_install_program(TARGET): a program that finds the libraries of the same prefix and LibTorch at run time.
function(flashlm_install_program target)
  set_target_properties(${target} PROPERTIES
    INSTALL_RPATH "$ORIGIN/../${CMAKE_INSTALL_LIBDIR}" INSTALL_RPATH_USE_LINK_PATH ON)
  install(TARGETS ${target})
endfunction()

flashlm_install_library(flashlm_ops ops ternary_weights.h)

flashlm_install_program(train_flashlm)
flashlm_install_program(flashlm)

install(EXPORT FlashLMTargets NAMESPACE FlashLM:: DESTINATION ${FLASHLM_PACKAGE_DIR})
configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/FlashLMConfig.cmake.in ${PROJECT_BINARY_DIR}/FlashLMConfig.cmake
  INSTALL_DESTINATION ${FLASHLM_PACKAGE_DIR})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/FlashLMConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/FlashLMConfig.cmake ${PROJECT_BINARY_DIR}/FlashLMConfigVersion.cmake
  DESTINATION ${FLASHLM_PACKAGE_DIR})
