"""An environment of its own for the tests; importing this module sets it.

What a user's shell sets (locale, time zone, width, tokens, proxies, jobs) must not decide a test. Kept are programs,
the folder of temporary files, and what the tools around the tests read.
"""

import os
import re
import time

_KEPT = re.compile("PATH|TMPDIR|CI|LD_.*|PYTEST_.*|COV_.*|COVERAGE_.*|OPENBLAS_.*|PYTHON(DONT|HASH).*|FUZZ_.*|KILLS")

for name in list(os.environ):
    if not _KEPT.fullmatch(name):
        del os.environ[name]
os.environ |= {"LANG": "C.UTF-8", "TZ": "UTC"}
time.tzset()
