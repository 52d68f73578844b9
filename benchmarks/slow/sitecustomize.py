"""Every read by os.pread as slow as network storage's, in whatever Python finds this by PYTHONPATH: for `run.py storage`."""

import os

from tests.slow_file import SlowFile

os.pread = SlowFile().pread
