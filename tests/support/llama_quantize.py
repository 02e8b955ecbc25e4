"""llama-quantize IN OUT TYPE, of llama.cpp; runs in the environment of `make llama`."""

import sys

from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

TYPES = {"Q8_0": 7, "Q4_K_M": 15}  # llama_ftype of llama.h

source, target, name = sys.argv[1:4]
library = get_lib()
library.llama_backend_init()
options = library.llama_model_quantize_default_params()
options.ftype = TYPES[name]
options.nthread = 1
sys.exit(library.llama_model_quantize(source.encode(), target.encode(), get_ffi().addressof(options)))
