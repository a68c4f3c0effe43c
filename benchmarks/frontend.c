/*
 * The guests' side of the benchmarks: vhost-user frontends, the drivers of virtio consoles and the
 * clients at the consoles' other ends, in C so that the measuring side is not the bottleneck.
 *
 *     frontend WORKLOAD --socket PREFIX --port N [--packed] [--seconds S] [--cpu N] …
 *     frontend WORKLOAD --floor=echo|device [--device-cpu N] …   a device in this process instead
 *
 *     roundtrip  --size N --gap-us N     one write at a time, the guest spins until it is used
 *     output     --size N --depth N --readers N --stuck N       as much as goes, to N clients
 *     input      --size N --depth N      as much as goes, into N buffers
 *     echo       --gap-us N              one key at a time
 *     idle       --guests N              nothing, until standard input ends
 *     load       --guests N --rate BYTES_PER_S --size N         a steady trickle from each guest
 *     answer     --guests N              until every guest's device answers
 *     copy                               no console: a plain TCP connection
 *
 * The sockets are PREFIX0, PREFIX1, …, the TCP ports N, N + 1, …. Runs one workload and prints one
 * line of JSON; status 1 and {"error": …} when it cannot finish. Sources: QEMU
 * docs/interop/vhost-user.rst; VIRTIO 1.2, sections 2.7 and 2.8 (split and packed virtqueues) and
 * 5.3 (console). When it kicks, waits and asks for interrupts follows Linux' driver: one descriptor
 * a buffer, a look at the device's wish after every buffer, our wish moved on every reap. (On packed
 * rings that is what it does where an event index is used; its console asks for every call there.)
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define USUAL_ENTRIES 64 /* of a ring: QEMU's default for a stock vhost-user device */
#define MOST_ENTRIES 256
#define LARGEST_BUFFER 65536
#define SMALL_BUFFER 4096 /* what Linux gives each of its receive and control buffers */
#define MOST_READERS 64
#define GUEST_BASE 0x40000000ull
#define SECOND 1000000000ull
#define PATIENCE (2 * SECOND) /* without any progress for this long, the device counts as hung */

static void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    printf("{\"error\": \"");
    vprintf(format, arguments);
    printf("\"}\n");
    fflush(stdout);
    _exit(1);
}

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * SECOND + (uint64_t)t.tv_nsec;
}

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void busy_wait(uint64_t nanoseconds) {
    for (uint64_t until = now() + nanoseconds; now() < until;) relax();
}

static void pin(int cpu) {
    cpu_set_t set;
    if (cpu < 0) return;
    CPU_ZERO(&set);
    CPU_SET((size_t)cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set)) fail("cannot run on CPU %d", cpu);
}

/* ---- the pattern: what byte belongs at each position of a stream ---- */

/* A prime period, so that a lost, doubled or exchanged buffer shows. Printable, so that a backend
 * which takes output for text can pass it on. */
#define PERIOD 65521
static char pattern[PERIOD + 65536];

static void make_pattern(void) {
    uint32_t state = 1;
    for (size_t i = 0; i < sizeof pattern; i++) {
        state = state * 1664525u + 1013904223u;
        pattern[i] = i < PERIOD ? (char)('!' + (state >> 16) % 94) : pattern[i - PERIOD];
    }
}

static const char *pattern_at(uint64_t position) { return pattern + position % PERIOD; }

/* ---- latencies ---- */

#define MOST_SAMPLES (4u << 20) /* later ones are only counted */
static uint32_t samples[MOST_SAMPLES];
static uint64_t sample_count;

static void add_sample(uint64_t nanoseconds) {
    if (sample_count < MOST_SAMPLES)
        samples[sample_count] = nanoseconds > UINT32_MAX ? UINT32_MAX : (uint32_t)nanoseconds;
    sample_count++;
}

static int by_value(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

/* Kicks and interrupts. */
struct counts { uint64_t kicks, calls; };

static void print_latencies(struct counts counts) {
    uint64_t kept = sample_count < MOST_SAMPLES ? sample_count : MOST_SAMPLES;
    if (!kept) fail("no round trip was completed");
    qsort(samples, kept, sizeof samples[0], by_value);
    printf("{\"count\": %lu, \"p50_us\": %.3f, \"p99_us\": %.3f, \"max_us\": %.3f, "
           "\"kicks\": %lu, \"calls\": %lu}\n",
           sample_count, samples[(kept - 1) / 2] / 1e3, samples[(kept - 1) * 99 / 100] / 1e3,
           samples[kept - 1] / 1e3, counts.kicks, counts.calls);
}

/* ---- the driver's side of a virtqueue (VIRTIO 1.2, sections 2.7 and 2.8) ---- */

#define DESC_WRITE 2
#define NO_NOTIFY 1
#define PACKED_AVAIL 0x80
#define PACKED_USED 0x8000
#define PACKED_LAP (PACKED_AVAIL | PACKED_USED)
enum { EVENT_ENABLE, EVENT_DISABLE, EVENT_DESC }; /* in bits 16 and 17 of an event word */

struct desc { uint64_t addr; uint32_t len; uint16_t flags, next; };
struct avail { uint16_t flags; _Atomic uint16_t idx; uint16_t ring[]; };
struct used { _Atomic uint16_t flags, idx; struct { uint32_t id, len; } ring[]; };
struct packed_desc { uint64_t addr; uint32_t len; uint16_t id; _Atomic uint16_t flags; };

/* What an entry of a ring says: which buffer, and how many bytes of it. */
struct entry { uint16_t id; uint32_t len; };

/* Each buffer is one descriptor. Positions in the ring are counts of buffers, modulo 2^16. */
struct queue {
    bool packed, event_idx, to_guest;
    uint16_t entries; /* a power of two */
    union { struct desc *desc; struct packed_desc *ring; };
    union { struct avail *avail; _Atomic uint32_t *driver_event; };
    union { struct used *used; _Atomic uint32_t *device_event; };
    _Atomic uint16_t *used_event, *avail_event; /* of a split ring */
    uint16_t next_avail, last_used;
    char *buffers; /* `entries` of them */
    uint64_t buffers_addr;
    uint32_t buffer_size, buffer_stride;
    int kick, call;
    struct counts counts;
};

static uint16_t slot(const struct queue *q, uint16_t count) {
    return count & (uint16_t)(q->entries - 1);
}

/* A packed ring's wrap counter: 1 in the first lap, 0 in the second, and so on. */
static bool wrap(const struct queue *q, uint16_t count) { return !(count & q->entries); }

/* A position as the event words of a packed ring give it. */
static uint16_t place(const struct queue *q, uint16_t count) {
    return (uint16_t)(slot(q, count) | wrap(q, count) << 15);
}

static void *buffer_of(const struct queue *q, uint16_t id) {
    return q->buffers + (size_t)q->buffer_stride * id;
}

static bool kick_wanted(const struct queue *q, uint16_t put) {
    if (!q->packed)
        return q->event_idx ? atomic_load(q->avail_event) == put
                            : !(atomic_load(&q->used->flags) & NO_NOTIFY);
    uint32_t event = atomic_load(q->device_event);
    if ((event >> 16 & 3) == EVENT_DESC) return (uint16_t)event == place(q, put);
    return (event >> 16 & 3) == EVENT_ENABLE;
}

/* Makes the first `len` bytes of buffer `id` available, and kicks if asked to. */
static void queue_put(struct queue *q, uint16_t id, uint32_t len) {
    uint16_t at = q->next_avail++, flags = q->to_guest ? DESC_WRITE : 0;
    uint64_t addr = q->buffers_addr + (uint64_t)q->buffer_stride * id;
    if (q->packed) {
        struct packed_desc *d = &q->ring[slot(q, at)];
        d->addr = addr;
        d->len = len;
        d->id = id;
        flags |= wrap(q, at) ? PACKED_AVAIL : PACKED_USED;
        atomic_store_explicit(&d->flags, flags, memory_order_release);
    } else {
        q->desc[id] = (struct desc){addr, len, flags, 0};
        q->avail->ring[slot(q, at)] = id;
        atomic_store_explicit(&q->avail->idx, q->next_avail, memory_order_release);
    }
    atomic_thread_fence(memory_order_seq_cst);
    if (!kick_wanted(q, at)) return;
    if (write(q->kick, &(uint64_t){1}, 8) != 8) fail("a kick could not be written");
    q->counts.kicks++;
}

/* Whether the device has used its buffer number `count`. */
static bool is_used(const struct queue *q, uint16_t count) {
    if (!q->packed) {
        uint16_t idx = atomic_load_explicit(&q->used->idx, memory_order_acquire);
        return (int16_t)(idx - count) > 0;
    }
    uint16_t flags = atomic_load_explicit(&q->ring[slot(q, count)].flags, memory_order_acquire);
    return (flags & PACKED_LAP) == (wrap(q, count) ? PACKED_LAP : 0);
}

static void ask_for_call(struct queue *q) {
    if (!q->event_idx) return;
    if (q->packed) atomic_store(q->driver_event, EVENT_DESC << 16 | place(q, q->last_used));
    else atomic_store(q->used_event, q->last_used);
}

static bool queue_get(struct queue *q, struct entry *e) {
    if (!is_used(q, q->last_used)) return false;
    uint16_t at = slot(q, q->last_used++);
    uint32_t id = q->packed ? q->ring[at].id : q->used->ring[at].id;
    uint32_t len = q->packed ? q->ring[at].len : q->used->ring[at].len;
    ask_for_call(q);
    if (id >= q->entries) fail("the device used buffer %u, which does not exist", id);
    *e = (struct entry){(uint16_t)id, len};
    return true;
}

/* Gives up, and leaves what is needed to tell whose wake-up was lost. */
static void queue_hangs(const struct queue *q, const char *what, uint64_t bytes) {
    uint16_t used = q->last_used;
    while ((uint16_t)(used - q->last_used) < q->entries && is_used(q, used)) used++;
    unsigned next = q->packed ? place(q, q->next_avail) : q->next_avail;
    unsigned seen = q->packed ? place(q, q->last_used) : q->last_used;
    unsigned kick = q->packed ? atomic_load(q->device_event) : atomic_load(q->avail_event);
    unsigned call = q->packed ? atomic_load(q->driver_event) : atomic_load(q->used_event);
    fail("%s stops after %lu bytes: the next available is %#x, %u used ones are not seen from "
         "%#x on; kick wanted at %#x, call at %#x",
         what, bytes, next, (uint16_t)(used - q->last_used), seen, kick, call);
}

static void take_calls(struct queue *q) {
    uint64_t calls;
    if (read(q->call, &calls, 8) == 8) q->counts.calls += calls;
}

/* Sleeps until an interrupt or `until`. queue_get has asked for it and must be tried after this. */
static void queue_sleep(struct queue *q, uint64_t until) {
    atomic_thread_fence(memory_order_seq_cst);
    if (is_used(q, q->last_used)) return;
    uint64_t t = now();
    struct pollfd p = {q->call, POLLIN, 0};
    if (t < until && poll(&p, 1, (int)((until - t) / 1000000 + 1)) > 0) take_calls(q);
}

/* ---- a guest: its memory and its queues ---- */

enum { RX, TX, CONTROL_RX, CONTROL_TX, QUEUES };

/* What a guest's rings and buffers are like. */
struct shape {
    bool packed;
    uint16_t entries, rx_count; /* how many receive buffers the device gets */
    uint32_t rx_size, tx_size;
};

struct guest {
    int socket, memory_fd;
    char *memory;
    size_t memory_size, allocated;
    uint64_t features, protocol_features;
    struct shape shape;
    struct queue queues[QUEUES];
};

static uint64_t round_up(uint64_t size, uint64_t unit) { return (size + unit - 1) / unit * unit; }

/* Zeroed memory that no other use shares a page with. */
static void *allocate(struct guest *g, size_t size) {
    char *start = g->memory + g->allocated;
    g->allocated += round_up(size, 4096);
    if (g->allocated > g->memory_size) fail("the guest's memory is too small");
    return start;
}

static void make_queue(struct guest *g, int index, uint32_t buffer_size) {
    struct queue *q = &g->queues[index];
    uint16_t entries = g->shape.entries;
    q->packed = g->shape.packed;
    q->entries = entries;
    q->to_guest = index == RX || index == CONTROL_RX;
    q->desc = allocate(g, sizeof *q->desc * entries);
    q->avail = allocate(g, q->packed ? 4 : sizeof *q->avail + 2 * entries + 2u);
    q->used = allocate(g, q->packed ? 4 : sizeof *q->used + 8 * entries + 2u);
    if (!q->packed) {
        q->used_event = (_Atomic uint16_t *)&q->avail->ring[entries];
        q->avail_event = (_Atomic uint16_t *)&q->used->ring[entries];
    }
    q->buffer_size = buffer_size;
    q->buffer_stride = (uint32_t)round_up(buffer_size, 64);
    q->buffers = allocate(g, (size_t)q->buffer_stride * entries);
    q->buffers_addr = GUEST_BASE + (uint64_t)(q->buffers - g->memory);
    q->kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    q->call = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (q->kick < 0 || q->call < 0) fail("no event file descriptors left");
}

/* Linux fills its receive rings before it starts the device. */
static void fill_queues(struct guest *g, bool event_idx) {
    for (int i = 0; i < QUEUES; i++) {
        struct queue *q = &g->queues[i];
        q->event_idx = event_idx;
        ask_for_call(q);
        unsigned count = i == RX ? g->shape.rx_count : i == CONTROL_RX ? q->entries : 0;
        for (uint16_t id = 0; id < count; id++) queue_put(q, id, q->buffer_size);
    }
}

static void make_guest(struct guest *g, const struct shape *shape) {
    memset(g, 0, sizeof *g);
    g->shape = *shape;
    size_t buffers = shape->entries * (shape->rx_size + shape->tx_size + 2ul * SMALL_BUFFER);
    g->memory_size = round_up((1 << 20) + buffers, 8 << 20);
    g->memory_fd = memfd_create("guest", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (g->memory_fd < 0 || ftruncate(g->memory_fd, (off_t)g->memory_size))
        fail("no memory for a guest");
    g->memory =
        mmap(NULL, g->memory_size, PROT_READ | PROT_WRITE, MAP_SHARED, g->memory_fd, 0);
    if (g->memory == MAP_FAILED) fail("no memory for a guest");
    make_queue(g, RX, shape->rx_size);
    make_queue(g, TX, shape->tx_size);
    make_queue(g, CONTROL_RX, SMALL_BUFFER);
    make_queue(g, CONTROL_TX, SMALL_BUFFER);
}

/* Returns what has crossed port 0's queues since it was last asked. */
static struct counts take_counts(struct guest *g) {
    struct counts counts = {0, 0};
    for (struct queue *q = &g->queues[RX]; q <= &g->queues[TX]; q++) {
        take_calls(q);
        counts.kicks += q->counts.kicks;
        counts.calls += q->counts.calls;
        q->counts = (struct counts){0, 0};
    }
    return counts;
}

/* Sends what is in transmit buffer `id` and spins until it is used, as Linux' hvc does. */
static void transmit_and_spin(struct guest *g, uint16_t id, uint32_t len) {
    struct queue *q = &g->queues[TX];
    struct entry e;
    queue_put(q, id, len);
    for (uint64_t spins = 1, until = 0; !queue_get(q, &e); spins++) {
        relax();
        if (spins % 65536) continue;
        if (!until) until = now() + PATIENCE;
        if (now() > until) queue_hangs(q, "a spinning guest", 0);
    }
}

/* ---- the vhost-user frontend ---- */

enum {
    GET_FEATURES = 1, SET_FEATURES = 2, SET_OWNER = 3, SET_MEM_TABLE = 5, SET_VRING_NUM = 8,
    SET_VRING_ADDR = 9, SET_VRING_BASE = 10, SET_VRING_KICK = 12, SET_VRING_CALL = 13,
    GET_PROTOCOL_FEATURES = 15, SET_PROTOCOL_FEATURES = 16, SET_VRING_ENABLE = 18,
};
enum {
    MULTIPORT = 1, INDIRECT_DESC = 28, EVENT_IDX = 29, PROTOCOL_FEATURES = 30, VERSION_1 = 32,
    RING_PACKED = 34,
};
enum { PROTOCOL_MQ = 0, PROTOCOL_REPLY_ACK = 3, PROTOCOL_CONFIG = 9 };
enum { MESSAGE_VERSION = 1, MESSAGE_REPLY = 4, MESSAGE_NEED_REPLY = 8 };

struct header { uint32_t request, flags, size; };

static bool has(uint64_t bits, int bit) { return bits >> bit & 1; }

static void send_message(struct guest *g, uint32_t request, uint32_t flags, const void *payload,
                         uint32_t size, int fd) {
    struct header header = {request, MESSAGE_VERSION | flags, size};
    struct iovec parts[] = {{&header, sizeof header}, {(void *)payload, size}};
    union { struct cmsghdr align; char bytes[CMSG_SPACE(sizeof(int))]; } control = {0};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
    if (fd >= 0) {
        message.msg_control = control.bytes;
        message.msg_controllen = sizeof control.bytes;
        struct cmsghdr *c = CMSG_FIRSTHDR(&message);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(c), &fd, sizeof fd);
    }
    if (sendmsg(g->socket, &message, MSG_NOSIGNAL) != (ssize_t)(sizeof header + size))
        fail("vhost-user request %u could not be sent", request);
}

static uint64_t receive_u64(struct guest *g, uint32_t request) {
    struct { struct header header; uint64_t value; } __attribute__((packed)) reply;
    if (recv(g->socket, &reply, sizeof reply, MSG_WAITALL) != (ssize_t)sizeof reply)
        fail("no reply to vhost-user request %u", request);
    if (reply.header.request != request || !(reply.header.flags & MESSAGE_REPLY))
        fail("a wrong reply to vhost-user request %u", request);
    return reply.value;
}

static uint64_t get(struct guest *g, uint32_t request) {
    send_message(g, request, 0, NULL, 0, -1);
    return receive_u64(g, request);
}

static void set(struct guest *g, uint32_t request, const void *payload, uint32_t size, int fd) {
    bool acknowledged = has(g->protocol_features, PROTOCOL_REPLY_ACK);
    send_message(g, request, acknowledged ? MESSAGE_NEED_REPLY : 0, payload, size, fd);
    if (acknowledged && receive_u64(g, request)) fail("vhost-user request %u was refused", request);
}

/* Connects to guest `index`'s socket; until `until` also to one that is not there yet. */
static void connect_frontend(struct guest *g, const char *prefix, int index, uint64_t until) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    size_t room = sizeof address.sun_path;
    if (snprintf(address.sun_path, room, "%s%d", prefix, index) >= (int)room)
        fail("the socket's path is too long");
    g->socket = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    while (connect(g->socket, (struct sockaddr *)&address, sizeof address)) {
        if ((errno != ENOENT && errno != ECONNREFUSED) || now() >= until)
            fail("cannot connect to vhost-user socket %d: %s", index, strerror(errno));
        nanosleep(&(struct timespec){0, 1000000}, NULL);
    }
    uint64_t left = until > now() ? until - now() : PATIENCE;
    struct timeval patience = {(time_t)(left / SECOND), (suseconds_t)(left % SECOND / 1000)};
    setsockopt(g->socket, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
}

static void negotiate(struct guest *g) {
    uint64_t offered = get(g, GET_FEATURES);
    if (!has(offered, VERSION_1)) fail("the device does not offer VERSION_1");
    if (g->shape.packed && !has(offered, RING_PACKED))
        fail("the device does not offer packed rings");
    g->features = offered & (1ull << VERSION_1 | 1ull << PROTOCOL_FEATURES | 1ull << EVENT_IDX |
                             1ull << INDIRECT_DESC | 1ull << MULTIPORT |
                             (uint64_t)g->shape.packed << RING_PACKED);
    if (has(offered, PROTOCOL_FEATURES)) {
        uint64_t known = 1 << PROTOCOL_MQ | 1 << PROTOCOL_REPLY_ACK | 1 << PROTOCOL_CONFIG;
        uint64_t wanted = get(g, GET_PROTOCOL_FEATURES) & known;
        set(g, SET_PROTOCOL_FEATURES, &wanted, 8, -1);
        g->protocol_features = wanted;
    }
    set(g, SET_OWNER, NULL, 0, -1);
    set(g, SET_FEATURES, &g->features, 8, -1);
    struct { uint32_t count, padding; uint64_t guest_addr, size, user_addr, offset; } table = {
        1, 0, GUEST_BASE, g->memory_size, (uintptr_t)g->memory, 0};
    set(g, SET_MEM_TABLE, &table, sizeof table, g->memory_fd);
}

static void start_queue(struct guest *g, uint32_t index) {
    struct queue *q = &g->queues[index];
    struct state { uint32_t index, num; };
    struct { uint32_t index, flags; uint64_t desc, used, avail, log; } addresses = {
        index, 0, (uintptr_t)q->desc, (uintptr_t)q->used, (uintptr_t)q->avail, 0};
    uint64_t with_fd = index;
    uint32_t start = (uint32_t)place(q, 0) << 16 | place(q, 0); /* used and available halves */
    set(g, SET_VRING_NUM, &(struct state){index, q->entries}, 8, -1);
    set(g, SET_VRING_BASE, &(struct state){index, q->packed ? start : 0}, 8, -1);
    set(g, SET_VRING_ADDR, &addresses, sizeof addresses, -1);
    set(g, SET_VRING_CALL, &with_fd, 8, q->call);
    set(g, SET_VRING_KICK, &with_fd, 8, q->kick);
    if (has(g->features, PROTOCOL_FEATURES))
        set(g, SET_VRING_ENABLE, &(struct state){index, 1}, 8, -1);
}

/* ---- the console's control dialogue (VIRTIO 1.2, section 5.3.6.2) ---- */

enum { DEVICE_READY, PORT_ADD, PORT_READY = 3, CONSOLE_PORT, PORT_OPEN = 6 };

struct control { uint32_t port; uint16_t event, value; };

static void send_control(struct guest *g, uint16_t event, uint16_t value) {
    struct queue *q = &g->queues[CONTROL_TX];
    uint16_t id = slot(q, q->next_avail);
    struct entry e;
    *(struct control *)buffer_of(q, id) = (struct control){0, event, value};
    queue_put(q, id, sizeof(struct control));
    for (uint64_t until = now() + PATIENCE; !queue_get(q, &e); queue_sleep(q, until))
        if (now() > until) fail("the device does not answer on the control queue");
}

static void open_port(struct guest *g) {
    struct queue *q = &g->queues[CONTROL_RX];
    uint64_t until = now() + PATIENCE;
    send_control(g, DEVICE_READY, 1);
    for (bool open = false; !open;) {
        struct entry e;
        if (!queue_get(q, &e)) {
            if (now() > until) fail("the device did not open port 0 within 2 s");
            queue_sleep(q, until);
            continue;
        }
        struct control message = *(struct control *)buffer_of(q, e.id);
        queue_put(q, e.id, q->buffer_size);
        if (e.len < sizeof message || message.port != 0) continue;
        if (message.event == PORT_ADD) send_control(g, PORT_READY, 1);
        if (message.event == CONSOLE_PORT) send_control(g, PORT_OPEN, 1);
        open = message.event == PORT_OPEN && message.value == 1;
    }
}

/* ---- the client at the console's other end ---- */

static void give_up_after(int fd, unsigned milliseconds) {
    struct timeval t = {milliseconds / 1000, milliseconds % 1000 * 1000};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &t, sizeof t);
}

static int connect_client(uint16_t port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(fd, (struct sockaddr *)&address, sizeof address))
        fail("cannot connect to the console's TCP port: %s", strerror(errno));
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
    give_up_after(fd, 2000);
    return fd;
}

static void say(struct guest *g, char byte) {
    *(char *)buffer_of(&g->queues[TX], 0) = byte;
    transmit_and_spin(g, 0, 1);
}

/* The guest repeats itself until `client` hears it: one that joins others hears from then on. */
static void attach(struct guest *g, int client, unsigned index) {
    struct pollfd heard = {client, POLLIN, 0};
    uint64_t until = now() + PATIENCE;
    do {
        if (now() > until) fail("client %u gets nothing of what the guest writes", index);
        say(g, 'R');
    } while (poll(&heard, 1, 100) <= 0);
}

/* From here on what the guest writes is all that comes. */
static void settle(struct guest *g, const int *clients, unsigned count) {
    say(g, 'E');
    for (unsigned i = 0; i < count; i++)
        for (char byte = 0; byte != 'E';) {
            if (recv(clients[i], &byte, 1, 0) != 1) fail("client %u missed bytes", i);
            if (byte != 'R' && byte != 'E')
                fail("client %u gets byte %d instead of what the guest writes", i, byte);
        }
}

static pthread_t start(void *(*run)(void *), void *argument) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, run, argument)) fail("cannot start a thread");
    return thread;
}

/* The clients of one console, read in turn by one thread. The first gets every byte, and they are
 * compared; the others may miss some, which are only counted; the last `stuck` of them never read.
 */
struct readers {
    int fds[MOST_READERS];
    unsigned count, stuck;
    uint64_t position;     /* of the first one's next byte */
    _Atomic uint64_t end;  /* where to stop; UINT64_MAX until it is known */
    uint64_t last_byte_at; /* when that one came, in ns */
    bool wrong;
    uint64_t watched[MOST_READERS];
};

/* Says whether there may be more to come. */
static bool read_first(struct readers *r, int flags) {
    static char data[65536];
    ssize_t count = recv(r->fds[0], data, sizeof data, flags);
    if (count <= 0) return count < 0 && now() < r->last_byte_at + PATIENCE;
    r->last_byte_at = now();
    if (memcmp(data, pattern_at(r->position), (size_t)count)) r->wrong = true;
    r->position += (uint64_t)count;
    return true;
}

/* Takes what there is without copying it (tcp(7), MSG_TRUNC), so that watchers cost little here. */
static void read_watcher(struct readers *r, unsigned index) {
    ssize_t count = recv(r->fds[index], NULL, 1 << 20, MSG_TRUNC | MSG_DONTWAIT);
    if (count == 0) fail("watcher %u was sent away", index);
    if (count > 0) r->watched[index] += (uint64_t)count;
}

static void *read_streams(void *argument) {
    struct readers *r = argument;
    unsigned reading = r->count - r->stuck;
    struct pollfd polled[MOST_READERS];
    for (unsigned i = 0; i < reading; i++) polled[i] = (struct pollfd){r->fds[i], POLLIN, 0};
    give_up_after(r->fds[0], 100);
    r->last_byte_at = now();
    bool more = true;
    while (more && r->position < r->end) {
        if (reading > 1) poll(polled, reading, 100);
        more = read_first(r, reading > 1 ? MSG_DONTWAIT : 0);
        for (unsigned i = 1; i < reading; i++)
            if (polled[i].revents) read_watcher(r, i);
    }
    /* Watchers may be behind; they are done when nothing comes for a moment. */
    while (reading > 1 && poll(polled + 1, reading - 1, 100) > 0)
        for (unsigned i = 1; i < reading; i++)
            if (polled[i].revents) read_watcher(r, i);
    return NULL;
}

/* A client that writes the pattern as fast as it can. */
struct writer {
    int fd, cpu;
    uint64_t position;    /* of the next byte */
    _Atomic uint64_t end; /* UINT64_MAX until it is known */
    uint64_t run_until;   /* in ns */
};

static void *write_stream(void *argument) {
    struct writer *w = argument;
    pin(w->cpu);
    give_up_after(w->fd, 100);
    while (now() < w->run_until) {
        ssize_t count = send(w->fd, pattern_at(w->position), 65536, MSG_NOSIGNAL);
        if (count > 0) w->position += (uint64_t)count;
    }
    w->end = w->position;
    return NULL;
}

/* ---- the floor: a minimal console device in this process ---- */

struct device { struct guest *guest; int client, cpu; };

struct device_queue {
    struct queue *q;          /* the driver's view: rings, buffers and file descriptors only */
    uint16_t next, published; /* positions; what is between them is used, but not told */
};

static bool device_look(struct device_queue *d, struct entry *e) {
    struct queue *q = d->q;
    uint16_t at = slot(q, d->next);
    if (!q->packed) {
        if (atomic_load_explicit(&q->avail->idx, memory_order_acquire) == d->next) return false;
        *e = (struct entry){q->avail->ring[at], q->desc[q->avail->ring[at]].len};
        return true;
    }
    uint16_t flags = atomic_load_explicit(&q->ring[at].flags, memory_order_acquire);
    if ((flags & PACKED_LAP) != (wrap(q, d->next) ? PACKED_AVAIL : PACKED_USED)) return false;
    *e = (struct entry){q->ring[at].id, q->ring[at].len};
    return true;
}

static void device_use(struct device_queue *d, uint16_t id, uint32_t len) {
    struct queue *q = d->q;
    uint16_t at = slot(q, d->next);
    if (q->packed) {
        q->ring[at].id = id;
        q->ring[at].len = len;
        uint16_t flags = wrap(q, d->next) ? PACKED_LAP : 0;
        atomic_store_explicit(&q->ring[at].flags, flags, memory_order_release);
    } else {
        q->used->ring[at].id = id;
        q->used->ring[at].len = len;
    }
    d->next++;
}

/* Publishes in a split ring; calls when one of these is what the driver wants to hear of. */
static void device_return(struct device_queue *d) {
    uint16_t count = d->next - d->published;
    d->published = d->next;
    if (!count) return;
    atomic_store_explicit(&d->q->used->idx, d->next, memory_order_release);
    atomic_thread_fence(memory_order_seq_cst);
    uint16_t event = atomic_load(d->q->used_event);
    if ((uint16_t)(d->next - event - 1) < count && write(d->q->call, &(uint64_t){1}, 8) != 8)
        fail("a call could not be written");
}

/* Returns each transmit buffer at once and does nothing else: no loop is shorter. */
static void *run_echo(void *argument) {
    struct device *device = argument;
    struct device_queue tx = {&device->guest->queues[TX], 0, 0};
    struct entry e;
    pin(device->cpu);
    if (tx.q->packed) atomic_store(tx.q->device_event, EVENT_DISABLE << 16);
    for (;;) {
        while (!device_look(&tx, &e)) relax();
        device_use(&tx, e.id, 0);
        if (!tx.q->packed)
            atomic_store_explicit(&tx.q->used->idx, tx.next, memory_order_release);
    }
    return NULL;
}

/* Copies output, returns the buffers, sends. Says whether there was any. */
static bool device_send(struct device_queue *tx, int client) {
    static char journal[2 << 20];
    size_t written = 0;
    struct entry e;
    while (written + LARGEST_BUFFER <= sizeof journal && device_look(tx, &e)) {
        memcpy(journal + written, buffer_of(tx->q, e.id), e.len);
        written += e.len;
        device_use(tx, e.id, 0);
    }
    device_return(tx);
    for (size_t sent = 0; sent < written;) {
        ssize_t count = send(client, journal + sent, written - sent, MSG_NOSIGNAL);
        if (count < 0 && errno != EAGAIN) return false;
        if (count > 0) sent += (size_t)count;
    }
    return written;
}

static bool device_receive(struct device_queue *rx, int client) {
    uint16_t before = rx->next;
    struct entry e;
    while (device_look(rx, &e)) {
        ssize_t count = recv(client, buffer_of(rx->q, e.id), e.len, MSG_DONTWAIT);
        if (count <= 0) break;
        device_use(rx, e.id, (uint32_t)count);
    }
    device_return(rx);
    return rx->next != before;
}

static void device_sleep(struct device_queue *rx, struct device_queue *tx, int client) {
    struct entry e;
    atomic_store(rx->q->avail_event, rx->next);
    atomic_store(tx->q->avail_event, tx->next);
    atomic_thread_fence(memory_order_seq_cst);
    bool room = device_look(rx, &e);
    if (device_look(tx, &e)) return;
    struct pollfd fds[] = {{tx->q->kick, POLLIN, 0},
                           {room ? -1 : rx->q->kick, POLLIN, 0},
                           {room ? client : -1, POLLIN, 0}};
    poll(fds, 3, 100);
    for (uint64_t kicks, i = 0; i < 2; i++)
        if (fds[i].revents && read(fds[i].fd, &kicks, 8) < 0 && errno != EAGAIN)
            fail("a kick could not be read");
}

static void *run_device(void *argument) {
    struct device *device = argument;
    struct device_queue rx = {&device->guest->queues[RX], 0, 0};
    struct device_queue tx = {&device->guest->queues[TX], 0, 0};
    pin(device->cpu);
    for (uint64_t spin_until = 0;;) {
        if (device_send(&tx, device->client)) spin_until = now() + 50000;
        if (now() < spin_until) relax();
        else if (!device_receive(&rx, device->client)) device_sleep(&rx, &tx, device->client);
    }
    return NULL;
}

/* Two ends of a TCP connection over loopback. */
static void connect_pair(int ends[2]) {
    struct sockaddr_in address = {.sin_family = AF_INET};
    socklen_t length = sizeof address;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 1) ||
        getsockname(listener, (struct sockaddr *)&address, &length))
        fail("no loopback listener: %s", strerror(errno));
    ends[0] = connect_client(ntohs(address.sin_port));
    ends[1] = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    if (ends[1] < 0) fail("no loopback connection: %s", strerror(errno));
    setsockopt(ends[1], IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
    give_up_after(ends[1], 100);
    close(listener);
}

/* ---- a guest, its device and its clients, put together ---- */

enum floor { NO_FLOOR, FLOOR_DEVICE, FLOOR_ECHO };

struct options {
    const char *socket;
    int port, cpu, device_cpu;
    unsigned guests, readers, stuck;
    uint32_t size, depth, gap_us;
    double seconds, rate;
    bool packed;
    enum floor floor;
};

static uint64_t after(double seconds) { return now() + (uint64_t)(seconds * (double)SECOND); }

/* A usual guest that writes at most --size bytes at once. */
static struct shape usual_shape(const struct options *o) {
    return (struct shape){o->packed, USUAL_ENTRIES, USUAL_ENTRIES, SMALL_BUFFER, o->size};
}

/* A guest whose queues hold --depth buffers. */
static struct shape deep_shape(const struct options *o) {
    struct shape shape = usual_shape(o);
    while (shape.entries < o->depth) shape.entries *= 2;
    shape.rx_count = shape.entries;
    return shape;
}

/* Boots guest `index`: negotiation, memory, queues, port 0 open. */
static void boot(struct guest *g, const struct options *o, int index, const struct shape *shape) {
    make_guest(g, shape);
    connect_frontend(g, o->socket, index, 0);
    negotiate(g);
    fill_queues(g, has(g->features, EVENT_IDX));
    bool multiport = has(g->features, MULTIPORT);
    for (uint32_t i = 0; i < (multiport ? QUEUES : CONTROL_RX); i++) start_queue(g, i);
    if (multiport) open_port(g);
}

/* What a workload of one guest works on. */
struct scene {
    struct guest guest;
    int clients[MOST_READERS]; /* as many as --readers; -1 for --floor=echo */
    struct device device;      /* of a floor; its thread ends with this process */
};

static struct scene *set_scene(const struct options *o, const struct shape *shape) {
    static struct scene s;
    int ends[2] = {-1, -1};
    if (o->floor) {
        make_guest(&s.guest, shape);
        fill_queues(&s.guest, true);
        if (o->floor == FLOOR_DEVICE) connect_pair(ends);
        s.clients[0] = ends[0];
        s.device = (struct device){&s.guest, ends[1], o->device_cpu};
        start(o->floor == FLOOR_ECHO ? run_echo : run_device, &s.device);
        if (o->floor == FLOOR_ECHO) return &s;
    } else
        boot(&s.guest, o, 0, shape);
    for (unsigned i = 0; i < o->readers; i++) {
        if (!o->floor) s.clients[i] = connect_client((uint16_t)o->port);
        attach(&s.guest, s.clients[i], i);
    }
    settle(&s.guest, s.clients, o->readers);
    return &s;
}

/* ---- the workloads ---- */

/* Begins a report; returns the bytes per second. */
static double print_rate(uint64_t bytes, uint64_t nanoseconds) {
    double seconds = (double)nanoseconds / 1e9, per_s = (double)bytes / seconds;
    printf("{\"bytes\": %lu, \"seconds\": %.6f, \"mb_s\": %.3f", bytes, seconds, per_s / 1e6);
    return per_s;
}

/* 16-byte (--size) writes, one at a time, the guest spinning, --gap-us apart. What arrives is read
 * and compared between batches, so that no reader competes with the spinning guest. */
#define ROUNDTRIP_BATCH 1000
#define ROUNDTRIP_MOST 64

static uint64_t roundtrip_batch(struct scene *s, const struct options *o, uint64_t position,
                                uint64_t until) {
    static char received[ROUNDTRIP_BATCH * ROUNDTRIP_MOST];
    unsigned written = 0;
    for (unsigned i = 0; i < ROUNDTRIP_BATCH && now() < until; i++, written += o->size) {
        uint16_t id = (uint16_t)(i % USUAL_ENTRIES);
        memcpy(buffer_of(&s->guest.queues[TX], id), pattern_at(position + written), o->size);
        uint64_t begin = now();
        transmit_and_spin(&s->guest, id, o->size);
        add_sample(now() - begin);
        if (o->gap_us) busy_wait(o->gap_us * 1000ull);
    }
    if (s->clients[0] < 0) return position + written;
    if (recv(s->clients[0], received, written, MSG_WAITALL) != (ssize_t)written)
        fail("the client missed bytes");
    if (memcmp(received, pattern_at(position), written)) fail("the client got wrong bytes");
    return position + written;
}

static void roundtrip(const struct options *o) {
    struct shape shape = usual_shape(o);
    uint64_t position = 0;
    if (o->size > ROUNDTRIP_MOST) fail("a round trip has at most %d bytes", ROUNDTRIP_MOST);
    struct scene *s = set_scene(o, &shape);
    for (uint64_t until = after(o->seconds / 5); now() < until;)
        position = roundtrip_batch(s, o, position, until);
    sample_count = 0;
    take_counts(&s->guest);
    for (uint64_t until = after(o->seconds); now() < until;)
        position = roundtrip_batch(s, o, position, until);
    print_latencies(take_counts(&s->guest));
}

/* --size byte writes, up to --depth of them under way; the guest sleeps when all are. */
static void write_for(struct guest *g, struct readers *readers, const struct options *o,
                      uint64_t until) {
    struct queue *q = &g->queues[TX];
    uint64_t position = readers->position, progress_at = now();
    uint16_t free_ids[MOST_ENTRIES];
    uint32_t free_count = o->depth;
    struct entry e;
    for (uint16_t i = 0; i < o->depth; i++) free_ids[i] = i;
    readers->end = UINT64_MAX;
    pthread_t thread = start(read_streams, readers);
    while (now() < until || free_count < o->depth) {
        while (queue_get(q, &e)) {
            free_ids[free_count++] = e.id;
            progress_at = now();
        }
        if (now() > progress_at + PATIENCE) queue_hangs(q, "output", position);
        if (free_count && now() < until) {
            uint16_t id = free_ids[--free_count];
            memcpy(buffer_of(q, id), pattern_at(position), o->size);
            position += o->size;
            queue_put(q, id, o->size);
        } else if (free_count < o->depth)
            queue_sleep(q, progress_at + PATIENCE);
    }
    readers->end = position;
    pthread_join(thread, NULL);
    if (readers->position != position)
        fail("the client got %lu of %lu bytes", readers->position, position);
    if (readers->wrong) fail("the client got wrong bytes");
}

static void output(const struct options *o) {
    struct shape shape = deep_shape(o);
    struct scene *s = set_scene(o, &shape);
    struct readers readers = {.count = o->readers, .stuck = o->stuck};
    memcpy(readers.fds, s->clients, sizeof readers.fds);
    write_for(&s->guest, &readers, o, after(o->seconds / 5));
    uint64_t warm_up = readers.position, begin = now();
    take_counts(&s->guest);
    write_for(&s->guest, &readers, o, after(o->seconds));
    struct counts counts = take_counts(&s->guest);
    double per_s = print_rate(readers.position - warm_up, readers.last_byte_at - begin);
    printf(", \"chains_s\": %.0f, \"kicks\": %lu, \"calls\": %lu, \"all_bytes\": %lu, "
           "\"watcher_bytes\": [",
           per_s / o->size, counts.kicks, counts.calls, readers.position);
    for (unsigned i = 1; i < readers.count; i++)
        printf("%s%lu", i > 1 ? ", " : "", readers.watched[i]);
    printf("]}\n");
}

/* The client writes as fast as it can; the guest has --depth buffers of --size bytes for it. */
static uint64_t read_for(struct guest *g, struct writer *writer, double seconds) {
    struct queue *q = &g->queues[RX];
    uint64_t position = writer->position, progress_at = now();
    struct entry e;
    writer->end = UINT64_MAX;
    writer->run_until = after(seconds);
    pthread_t thread = start(write_stream, writer);
    while (position < writer->end) {
        if (!queue_get(q, &e)) {
            if (now() > progress_at + PATIENCE) queue_hangs(q, "input", position);
            queue_sleep(q, now() + SECOND / 10);
            continue;
        }
        progress_at = now();
        if (e.len > q->buffer_size) fail("the device used %u bytes of a smaller buffer", e.len);
        if (memcmp(buffer_of(q, e.id), pattern_at(position), e.len))
            fail("the guest got wrong bytes after %lu", position);
        position += e.len;
        queue_put(q, e.id, q->buffer_size);
    }
    uint64_t last_byte_at = now();
    pthread_join(thread, NULL);
    return last_byte_at;
}

static void input(const struct options *o) {
    struct shape shape = deep_shape(o);
    shape.rx_count = (uint16_t)o->depth;
    shape.rx_size = o->size;
    struct scene *s = set_scene(o, &shape);
    struct writer writer = {.fd = s->clients[0], .cpu = o->cpu};
    read_for(&s->guest, &writer, o->seconds / 5);
    uint64_t warm_up = writer.position, begin = now();
    take_counts(&s->guest);
    uint64_t last_byte_at = read_for(&s->guest, &writer, o->seconds);
    struct counts counts = take_counts(&s->guest);
    print_rate(writer.position - warm_up, last_byte_at - begin);
    printf(", \"kicks\": %lu, \"calls\": %lu, \"all_bytes\": %lu}\n", counts.kicks, counts.calls,
           writer.position);
}

/* One key at a time, --gap-us apart; the guest echoes it. With a gap that the scheduler cannot
 * keep, the typist spins: its key then finds the device still looking. */
#define SHORTEST_SLEEP_US 1000

struct typist {
    int fd;
    uint32_t gap_us, keys; /* at most so many */
    uint64_t until;
    _Atomic bool done, failed;
};

static void *type(void *argument) {
    struct typist *t = argument;
    for (unsigned i = 0; i < t->keys && now() < t->until; i++) {
        struct timespec gap = {t->gap_us / 1000000, t->gap_us % 1000000 * 1000};
        char key = (char)('a' + i % 26), echo = 0;
        if (t->gap_us < SHORTEST_SLEEP_US) busy_wait(t->gap_us * 1000ull);
        else nanosleep(&gap, NULL);
        uint64_t begin = now();
        if (send(t->fd, &key, 1, MSG_NOSIGNAL) != 1 || recv(t->fd, &echo, 1, 0) != 1 ||
            echo != key) {
            t->failed = true;
            break;
        }
        add_sample(now() - begin);
    }
    t->done = true;
    return NULL;
}

static void echo_for(struct scene *s, const struct options *o, unsigned keys, double seconds) {
    struct queue *rx = &s->guest.queues[RX], *tx = &s->guest.queues[TX];
    struct typist typist = {s->clients[0], o->gap_us, keys, after(seconds), false, false};
    struct entry e;
    sample_count = 0;
    pthread_t thread = start(type, &typist);
    while (!typist.done) {
        if (!queue_get(rx, &e)) {
            queue_sleep(rx, now() + SECOND / 10);
            continue;
        }
        if (e.len > tx->buffer_size) fail("the device used more bytes than a key has");
        memcpy(buffer_of(tx, 0), buffer_of(rx, e.id), e.len);
        queue_put(rx, e.id, rx->buffer_size);
        if (e.len) transmit_and_spin(&s->guest, 0, e.len);
    }
    pthread_join(thread, NULL);
    if (typist.failed) fail("no echo of key %lu", sample_count + 1);
}

static void echo(const struct options *o) {
    struct shape shape = usual_shape(o);
    shape.tx_size = shape.rx_size;
    struct scene *s = set_scene(o, &shape);
    echo_for(s, o, 5, o->seconds);
    take_counts(&s->guest);
    echo_for(s, o, UINT32_MAX, o->seconds);
    print_latencies(take_counts(&s->guest));
}

/* A guest with a client, and what is under way between them. */
struct line {
    struct guest guest;
    int client;
    uint16_t free_ids[USUAL_ENTRIES], free_count;
    _Atomic uint64_t written; /* bytes */
    uint64_t read;
    bool wrong;
    _Atomic uint64_t written_at[1024]; /* of the latest pieces, in ns */
};

/* Sets up --guests of them, and says so: whoever measures the daemon leaves the boot out. */
static struct line *set_lines(const struct options *o) {
    struct line *lines = calloc(o->guests, sizeof *lines);
    struct shape shape = usual_shape(o);
    if (!lines) fail("no memory for %u guests", o->guests);
    for (unsigned i = 0; i < o->guests; i++) {
        struct line *l = &lines[i];
        boot(&l->guest, o, (int)i, &shape);
        l->client = connect_client((uint16_t)(o->port + (int)i));
        attach(&l->guest, l->client, i);
        settle(&l->guest, &l->client, 1);
        for (; l->free_count < USUAL_ENTRIES; l->free_count++)
            l->free_ids[l->free_count] = l->free_count;
        take_counts(&l->guest);
    }
    printf("{\"guests\": %u}\n", o->guests);
    fflush(stdout);
    return lines;
}

/* Nothing happens until standard input ends. */
static void idle(const struct options *o) {
    set_lines(o);
    while (getchar() != EOF) {}
}

/* The clients of all guests, read by one thread. */
struct load {
    const struct options *options;
    struct line *lines;
    _Atomic bool written;  /* nothing more will be */
    uint64_t last_byte_at; /* in ns */
    uint64_t latest;       /* the largest time from a write to its arrival, in ns */
};

static void read_line(struct load *load, struct line *l) {
    static char data[65536];
    uint32_t size = load->options->size;
    ssize_t count = recv(l->client, data, sizeof data, MSG_DONTWAIT);
    if (count == 0) fail("a client was sent away");
    if (count < 0) return;
    if (memcmp(data, pattern_at(l->read), (size_t)count)) l->wrong = true;
    load->last_byte_at = now();
    uint64_t piece = l->read / size;
    l->read += (uint64_t)count;
    for (; piece < l->read / size; piece++) {
        uint64_t late = load->last_byte_at - l->written_at[piece % 1024];
        if (late > load->latest) load->latest = late;
    }
}

static uint64_t bytes_missing(const struct load *load) {
    uint64_t missing = 0;
    for (unsigned i = 0; i < load->options->guests; i++)
        missing += load->lines[i].written - load->lines[i].read;
    return missing;
}

static void *read_lines(void *argument) {
    struct load *load = argument;
    struct epoll_event events[64];
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    for (unsigned i = 0; i < load->options->guests; i++) {
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = &load->lines[i]};
        if (epoll_ctl(epoll, EPOLL_CTL_ADD, load->lines[i].client, &event))
            fail("cannot watch a client: %s", strerror(errno));
    }
    load->last_byte_at = now();
    while (!load->written || bytes_missing(load)) {
        int count = epoll_wait(epoll, events, 64, 100);
        for (int i = 0; i < count; i++) read_line(load, events[i].data.ptr);
        if (load->written && now() > load->last_byte_at + PATIENCE) break;
    }
    close(epoll);
    return NULL;
}

/* Writes one piece, unless the device still holds all buffers; says whether it did. */
static bool write_piece(struct line *l, uint32_t size) {
    struct queue *q = &l->guest.queues[TX];
    uint64_t written = l->written;
    struct entry e;
    while (queue_get(q, &e)) l->free_ids[l->free_count++] = e.id;
    if (!l->free_count) return false;
    uint16_t id = l->free_ids[--l->free_count];
    memcpy(buffer_of(q, id), pattern_at(written), size);
    l->written_at[written / size % 1024] = now();
    l->written = written + size;
    queue_put(q, id, size);
    return true;
}

/* Pieces are due at even distances, the guests one after the other; sleeps in between. Returns
 * how many could not be written when they were due. */
static uint64_t write_pieces(struct load *load, uint64_t begin) {
    const struct options *o = load->options;
    double distance = o->size / o->rate / o->guests * (double)SECOND;
    uint64_t most = (uint64_t)(o->seconds * (double)SECOND / distance), held = 0;
    for (uint64_t i = 0; i < most; i++) {
        uint64_t due = begin + (uint64_t)((double)i * distance);
        struct timespec at = {(time_t)(due / SECOND), (long)(due % SECOND)};
        while (now() < due) clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, NULL);
        held += !write_piece(&load->lines[i % o->guests], o->size);
    }
    load->written = true;
    return held;
}

static void load(const struct options *o) {
    struct load load = {.options = o, .lines = set_lines(o)};
    struct counts counts = {0, 0};
    uint64_t begin = now(), bytes = 0, wrong = 0;
    pthread_t thread = start(read_lines, &load);
    uint64_t held = write_pieces(&load, begin);
    pthread_join(thread, NULL);
    for (unsigned i = 0; i < o->guests; i++) {
        struct counts more = take_counts(&load.lines[i].guest);
        counts.kicks += more.kicks;
        counts.calls += more.calls;
        bytes += load.lines[i].read;
        wrong += load.lines[i].wrong;
    }
    printf("{\"guests\": %u, \"bytes\": %lu, \"lost\": %lu, \"wrong\": %lu, \"held\": %lu, "
           "\"seconds\": %.6f, \"late_ms\": %.3f, \"kicks\": %lu, \"calls\": %lu}\n",
           o->guests, bytes, bytes_missing(&load), wrong, held,
           (double)(load.last_byte_at - begin) / 1e9, (double)load.latest / 1e6, counts.kicks,
           counts.calls);
}

/* Asks every guest's device for its features as soon as its socket is there. */
static void answer(const struct options *o) {
    struct guest *guests = calloc(o->guests, sizeof *guests);
    uint64_t until = now() + 30 * SECOND;
    if (!guests) fail("no memory for %u guests", o->guests);
    for (unsigned i = 0; i < o->guests; i++) {
        connect_frontend(&guests[i], o->socket, (int)i, until);
        send_message(&guests[i], GET_FEATURES, 0, NULL, 0, -1);
    }
    for (unsigned i = 0; i < o->guests; i++) receive_u64(&guests[i], GET_FEATURES);
    printf("{\"guests\": %u, \"monotonic_ns\": %lu}\n", o->guests, now());
}

/* What a TCP connection over loopback carries from one CPU to the other, checked as above. */
static void copy(const struct options *o) {
    int ends[2];
    connect_pair(ends);
    struct writer writer = {.fd = ends[1], .cpu = o->device_cpu, .end = UINT64_MAX};
    struct readers reader = {.fds = {ends[0]}, .count = 1, .end = UINT64_MAX};
    uint64_t begin = now();
    writer.run_until = after(o->seconds);
    pthread_t writing = start(write_stream, &writer), reading = start(read_streams, &reader);
    pthread_join(writing, NULL);
    reader.end = writer.position;
    pthread_join(reading, NULL);
    if (reader.wrong || reader.position != writer.position) fail("the socket lost bytes");
    print_rate(reader.position, reader.last_byte_at - begin);
    printf("}\n");
}

/* ---- the command line ---- */

struct workload {
    const char *name;
    void (*run)(const struct options *);
    uint32_t depth;    /* unless --depth says another */
    enum floor floors; /* this one and those before it */
    bool socket, port; /* what it needs otherwise */
};

static const struct workload workloads[] = {
    {"roundtrip", roundtrip, 1, FLOOR_ECHO, true, true},
    {"output", output, 1, FLOOR_DEVICE, true, true},
    {"input", input, 64, FLOOR_DEVICE, true, true},
    {"echo", echo, 1, FLOOR_DEVICE, true, true},
    {"idle", idle, 1, NO_FLOOR, true, true},
    {"load", load, 1, NO_FLOOR, true, true},
    {"answer", answer, 1, NO_FLOOR, true, false},
    {"copy", copy, 1, NO_FLOOR, false, false},
};

static const struct workload *find_workload(const char *name) {
    for (size_t i = 0; i < sizeof workloads / sizeof workloads[0]; i++)
        if (!strcmp(name, workloads[i].name)) return &workloads[i];
    fail("there is no workload of that name");
    return NULL;
}

static enum floor find_floor(const char *name) {
    if (!strcmp(name, "echo")) return FLOOR_ECHO;
    if (strcmp(name, "device")) fail("--floor is echo or device");
    return FLOOR_DEVICE;
}

static void check(const struct workload *w, const struct options *o) {
    if (o->floor > w->floors) fail("this workload has no such floor");
    if (o->floor == FLOOR_DEVICE && o->packed) fail("--floor=device has no packed rings");
    if (!o->floor && w->socket && !o->socket) fail("name the --socket");
    if (!o->floor && w->port && !o->port) fail("name the --port");
    if (!o->size || o->size > LARGEST_BUFFER) fail("--size is 1 to %d", LARGEST_BUFFER);
    if (!o->depth || o->depth > MOST_ENTRIES) fail("--depth is 1 to %d", MOST_ENTRIES);
    if (!o->readers || o->readers > MOST_READERS) fail("--readers is 1 to %d", MOST_READERS);
    if (o->stuck >= o->readers) fail("--stuck is less than --readers: the first one reads");
    if (o->readers > 1 && (w->run != output || o->floor))
        fail("only output has more --readers, and no floor");
    if (!(o->rate > 0) || !o->guests) fail("--rate and --guests are more than 0");
}

int main(int argc, char **argv) {
    struct options o = {.cpu = -1, .device_cpu = -1, .guests = 1, .readers = 1, .size = 16,
                        .seconds = 1, .rate = 10000};
    enum { SOCKET, PORT, CPU, DEVICE_CPU, GUESTS, SIZE, DEPTH, GAP, SECONDS, FLOOR, PACKED,
           READERS, STUCK, RATE };
    struct option names[] = {
        {"socket", 1, 0, SOCKET}, {"port", 1, 0, PORT}, {"cpu", 1, 0, CPU},
        {"device-cpu", 1, 0, DEVICE_CPU}, {"guests", 1, 0, GUESTS}, {"size", 1, 0, SIZE},
        {"depth", 1, 0, DEPTH}, {"gap-us", 1, 0, GAP}, {"seconds", 1, 0, SECONDS},
        {"floor", 1, 0, FLOOR}, {"packed", 0, 0, PACKED}, {"readers", 1, 0, READERS},
        {"stuck", 1, 0, STUCK}, {"rate", 1, 0, RATE}, {0}};
    for (int option; (option = getopt_long(argc, argv, "", names, NULL)) >= 0;) switch (option) {
        case SOCKET: o.socket = optarg; break;
        case PORT: o.port = atoi(optarg); break;
        case CPU: o.cpu = atoi(optarg); break;
        case DEVICE_CPU: o.device_cpu = atoi(optarg); break;
        case GUESTS: o.guests = (unsigned)atoi(optarg); break;
        case SIZE: o.size = (uint32_t)atoi(optarg); break;
        case DEPTH: o.depth = (uint32_t)atoi(optarg); break;
        case GAP: o.gap_us = (uint32_t)atoi(optarg); break;
        case SECONDS: o.seconds = atof(optarg); break;
        case FLOOR: o.floor = find_floor(optarg); break;
        case PACKED: o.packed = true; break;
        case READERS: o.readers = (unsigned)atoi(optarg); break;
        case STUCK: o.stuck = (unsigned)atoi(optarg); break;
        case RATE: o.rate = atof(optarg); break;
        default: return 2;
        }
    if (optind + 1 != argc) fail("name one workload");
    const struct workload *workload = find_workload(argv[optind]);
    if (!o.depth) o.depth = workload->depth;
    check(workload, &o);
    pin(o.cpu);
    struct rlimit files; /* every guest has a dozen */
    if (!getrlimit(RLIMIT_NOFILE, &files)) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    make_pattern();
    workload->run(&o);
    return 0;
}
