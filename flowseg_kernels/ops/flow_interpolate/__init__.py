"""The point at time t on the straight path from source to code: x_t = (1 - t) x0 + t mu_y."""
