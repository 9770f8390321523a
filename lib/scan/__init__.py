"""Fixed and selective scans: one operation, one signature, four backends that agree."""

from lib.scan.selective import BACKENDS, fastest_backend, loop, selective_scan, selective_step
from lib.scan.ssd import ssd_scan, ssd_step
from lib.scan.trapezoid import trapezoid_scan
