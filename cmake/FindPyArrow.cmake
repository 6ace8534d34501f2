# The wheel of pyarrow holds libarrow and libparquet with their headers, which Debian lacks: this defines PyArrow::parquet.
# Looked for in PyArrow_ROOT, then in the Python of Python3_EXECUTABLE, of Torch_DIR, and of .venv.
set(_site_folders)
if(Python3_EXECUTABLE)
  execute_process(OUTPUT_VARIABLE _pyarrow OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET
    COMMAND ${Python3_EXECUTABLE} -c "import importlib.util as u; print(*u.find_spec('pyarrow').submodule_search_locations)")
  if(_pyarrow)
    list(APPEND _site_folders ${_pyarrow}/..)
  endif()
endif()
if(Torch_DIR)
  list(APPEND _site_folders ${Torch_DIR}/../../../..)
endif()
file(GLOB _venv ${PROJECT_SOURCE_DIR}/.venv/lib/python3*/site-packages)
list(APPEND _site_folders ${_venv})
list(TRANSFORM _site_folders APPEND /pyarrow)

find_path(PyArrow_INCLUDE_DIR parquet/api/reader.h HINTS ${_site_folders} PATH_SUFFIXES include NO_DEFAULT_PATH)
if(PyArrow_INCLUDE_DIR)
  get_filename_component(_pyarrow ${PyArrow_INCLUDE_DIR} DIRECTORY)
  # Named libarrow.so.2600 in version 26: there is no link without the number for find_library.
  file(GLOB PyArrow_arrow_LIBRARY ${_pyarrow}/libarrow.so.*[0-9])
  file(GLOB PyArrow_parquet_LIBRARY ${_pyarrow}/libparquet.so.*[0-9])
  file(STRINGS ${PyArrow_INCLUDE_DIR}/arrow/util/config.h PyArrow_VERSION REGEX "define ARROW_VERSION_STRING")
  string(REGEX MATCH "[0-9.]+" PyArrow_VERSION "${PyArrow_VERSION}")
endif()
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(PyArrow
  REQUIRED_VARS PyArrow_parquet_LIBRARY PyArrow_arrow_LIBRARY PyArrow_INCLUDE_DIR
  VERSION_VAR PyArrow_VERSION
  REASON_FAILURE_MESSAGE "Parquet files will not be read. tools/setup installs pyarrow, and -DPython3_EXECUTABLE=PYTHON names a Python that has it.")
if(PyArrow_FOUND AND NOT TARGET PyArrow::parquet)
  add_library(PyArrow::arrow SHARED IMPORTED)
  set_target_properties(PyArrow::arrow PROPERTIES
    IMPORTED_LOCATION ${PyArrow_arrow_LIBRARY} INTERFACE_INCLUDE_DIRECTORIES ${PyArrow_INCLUDE_DIR})
  add_library(PyArrow::parquet SHARED IMPORTED)
  set_target_properties(PyArrow::parquet PROPERTIES
    IMPORTED_LOCATION ${PyArrow_parquet_LIBRARY} INTERFACE_LINK_LIBRARIES PyArrow::arrow)
endif()
mark_as_advanced(PyArrow_INCLUDE_DIR)
