"""`python command_with_clock.py CLOCK_ERROR LEASE ARGUMENT…`: a blipfit command whose clock is wrong."""

import sys
import time

from blipfit import folder_lock
from blipfit.__main__ import main

error, folder_lock.LEASE_SECONDS, folder_lock.HEARTBEAT_SECONDS = int(sys.argv[1]), float(sys.argv[2]), 0.5
real = time.time
time.time = lambda: real() + error
sys.argv[1:] = sys.argv[3:]
main()
