"""State in host memory that is stepped on the device."""
