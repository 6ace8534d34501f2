# SPDX-License-Identifier: Apache-2.0
# Sourced by the scripts in tools/, never run: goes to the repository's root and says where Python and PyTorch are.
# shellcheck shell=bash

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

# Prints the comment at the head of the calling script: its --help.
print_help() { sed -n '3,/^[^#]/{/^#/!d;s/^# \{0,1\}//;p}' "tools/${0##*/}"; }

die() {
  echo "${0##*/}: $*" >&2
  exit 1
}

# probe_torch PYTHON: fails unless that interpreter has PyTorch 2.13 built for CPUs, or for CUDA with a toolkit beside it, which PyTorch's
# CMake package demands. Prints the folder of that package and then the packages of requirements.txt that are missing. Nothing is
# imported: `import torch` takes seconds.
probe_torch() {
  "$1" - <<'PY' 2>/dev/null
import importlib.metadata, importlib.util, pathlib, re, shutil, sys
spec = importlib.util.find_spec("torch")
if not spec or not spec.origin or not importlib.metadata.version("torch").startswith("2.13."):
    sys.exit(1)
torch = pathlib.Path(spec.origin).parent
built_for_cuda = re.search(r"^cuda.*= '", (torch / "version.py").read_text(), re.MULTILINE)
if not (torch / "share/cmake/Torch").is_dir() or (built_for_cuda and not shutil.which("nvcc")):
    sys.exit(1)
print(torch / "share/cmake/Torch")
print(*[name for name in ("numpy", "pytest", "matplotlib", "safetensors", "pyarrow", "xxhash",
                        "tokenizers", "tiktoken") if not importlib.util.find_spec(name)])
PY
}

# find_torch: exports PYTHON, an interpreter with PyTorch and all of requirements.txt, and Torch_DIR, the CMake package of that same
# PyTorch. Looks at the Python that Torch_DIR belongs to or, without Torch_DIR, at python3 (the active venv's, if one is active),
# then .venv. Fails if none will do; INCOMPLETE then says which has a PyTorch but lacks other packages, if one has.
# shellcheck disable=SC2034
find_torch() {
  local candidates=(python3 .venv/bin/python) candidate answer folder missing
  INCOMPLETE=''
  if [[ ${Torch_DIR-} ]]; then candidates=("${Torch_DIR%/lib/python*}/bin/python3" python3); fi
  for candidate in "${candidates[@]}"; do
    answer=$(probe_torch "$candidate") || continue
    folder=${answer%%$'\n'*} missing=${answer#"$folder"}
    [[ ! ${Torch_DIR-} || $folder -ef $Torch_DIR ]] || continue
    if [[ ! $missing ]]; then
      export PYTHON=$candidate Torch_DIR=$folder
      return
    fi
    INCOMPLETE="$candidate has PyTorch but not ${missing#$'\n'}"
  done
  return 1
}

# stage TITLE: a heading, preceded by the time that the stage before took. stage_end closes the last one.
stage() {
  stage_end
  stage_start=$SECONDS
  printf '\n== %s\n' "$*"
}
stage_end() {
  if [[ -n ${stage_start-} ]]; then printf -- '-- %d s\n' $((SECONDS - stage_start)); fi
  stage_start=''
}

# configure CMAKE_ARGUMENT...: configures; what CMake has to say is shown only if it fails.
configure() {
  mkdir -p build
  cmake "$@" &>build/configure.log || {
    cat build/configure.log >&2
    return 1
  }
}

# Compilers to run at once: one for each processor, but each source that includes LibTorch takes up to 2 GB.
build_jobs() {
  local processors memory_gb
  processors=$(nproc)
  memory_gb=$(awk '/^MemAvailable:/ {print int($2 / 1048576)}' /proc/meminfo)
  local jobs=$((memory_gb / 2 < processors ? memory_gb / 2 : processors))
  echo $((jobs > 1 ? jobs : 1))
}
