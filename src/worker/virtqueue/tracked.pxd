# Types for the compiled core, beside tracked.py, which runs as it is without a compiler.
from .packed cimport PackedQueue
from .split cimport SplitQueue


cdef class TrackedSplitQueue(SplitQueue):
    cdef object _state
    cdef object _again
    cdef object _taken
    cdef object _batch

    cpdef bint ready(self) except *
    cpdef _expose(self)


cdef class TrackedPackedQueue(PackedQueue):
    cdef object _state
    cdef object _again
    cdef object _taken
    cdef object _batch
    cdef object _open
    cdef object _walked

    cpdef bint ready(self) except *
    cpdef _expose(self)
