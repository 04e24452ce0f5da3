"""Problems, families of Jacobians and counters that several tests share."""
