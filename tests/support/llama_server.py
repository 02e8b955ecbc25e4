"""llama.cpp's server: FILE NAME; prints its URL. Runs in the environment of `make llama`."""

import signal
import sys

from xllamacpp import CommonParams, Server

file, name = sys.argv[1:]
options = CommonParams()
options.model.path = file
options.model_alias = {name}
options.port = 0  # any free port
options.n_ctx = 4096
options.n_parallel = 2
options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1  # several wait for each other busily
server = Server(options)  # which ends when no name refers to it
print(server.listening_address, flush=True)
signal.pause()
