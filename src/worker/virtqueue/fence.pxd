# The compiled core's fence; see fence.py.
cdef extern from *:
    """
    static inline void full_fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
    """
    void full "full_fence"() noexcept nogil
