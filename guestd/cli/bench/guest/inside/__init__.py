"""What runs inside the VM. Each file is copied into it and runs there by itself; the host only tests them."""
