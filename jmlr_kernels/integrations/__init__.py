"""The kernels inside other libraries: one short module each, which imports its library only when it is used."""
