"""`guestctl bench-guest`: what the guest daemon does for and costs a real VM, beside what others do.

`run` puts it together; `rig` is one VM with a broker and hands inside it. One file per benchmark: `reaction`, `ramp`,
`tax`, `reclaim`, `quiet` with `footprint`; each measures, judges and prints its part. `report` has what they share
and puts the parts into one file. Everything below `inside` runs in the VM.
"""
