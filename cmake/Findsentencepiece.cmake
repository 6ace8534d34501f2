# Debian's libsentencepiece-dev ships no CMake package: this defines sentencepiece::sentencepiece (run and train).
find_path(sentencepiece_INCLUDE_DIR sentencepiece_trainer.h)
find_library(sentencepiece_LIBRARY sentencepiece)
find_library(sentencepiece_train_LIBRARY sentencepiece_train)
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(sentencepiece
  REQUIRED_VARS sentencepiece_LIBRARY sentencepiece_train_LIBRARY sentencepiece_INCLUDE_DIR
  REASON_FAILURE_MESSAGE "Install libsentencepiece-dev, or run tools/setup.")
if(sentencepiece_FOUND AND NOT TARGET sentencepiece::sentencepiece)
  add_library(sentencepiece::sentencepiece INTERFACE IMPORTED)
  target_include_directories(sentencepiece::sentencepiece INTERFACE ${sentencepiece_INCLUDE_DIR})
  target_link_libraries(sentencepiece::sentencepiece INTERFACE ${sentencepiece_train_LIBRARY} ${sentencepiece_LIBRARY})
endif()
mark_as_advanced(sentencepiece_INCLUDE_DIR sentencepiece_LIBRARY sentencepiece_train_LIBRARY)
