"""The benchmarks of `guestctl`: `guest` is `bench-guest`, in real VMs; `broker` and its files are `bench-broker`."""
