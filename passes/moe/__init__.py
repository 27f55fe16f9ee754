"""What fuse_moe proves, and how: values read element by element, experts, routers."""
