"""Devices, dtypes, attention kernels, memory, compiling, profiling, processes and configuration."""
