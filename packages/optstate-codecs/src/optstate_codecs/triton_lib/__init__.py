"""Device functions that formats, rules, writes and kernels share, one module a subject."""

from optstate_codecs.triton_lib.arithmetic import *  # noqa: F403
from optstate_codecs.triton_lib.bytes import *  # noqa: F403
from optstate_codecs.triton_lib.core import *  # noqa: F403
from optstate_codecs.triton_lib.random import *  # noqa: F403
from optstate_codecs.triton_lib.tiles import *  # noqa: F403
