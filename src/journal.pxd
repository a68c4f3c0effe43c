# Types for the compiled core, beside journal.py, which runs as it is without a compiler.
cimport cython

cdef extern from *:
    """
    typedef volatile unsigned long long shared64;
    """
    ctypedef unsigned long long shared64

cdef int _OUT_HEAD
cdef int _OUT_TAIL


cdef class Output:
    cdef readonly long long size
    cdef readonly long long head
    cdef readonly long long tail
    cdef long long _mask
    cdef object _view
    cdef unsigned char[::1] _ring
    cdef shared64[::1] _words

    @cython.locals(tail=cython.longlong, start=cython.longlong, end=cython.longlong, first=cython.longlong)
    cpdef append_from(self, const unsigned char[::1] source, long long at, long long count)
    cpdef commit(self)
