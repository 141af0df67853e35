"""Virtual machines that run the kernel tests on kernels other than the host's: see `run.py`."""
