"""What stands where, and for how long: configuration, the Serve application, supervision."""
