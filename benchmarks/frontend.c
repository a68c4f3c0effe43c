/*
 * The guest's side of the benchmarks: a vhost-user frontend, the driver of a virtio console and
 * the client at the console's other end, in C so that the measuring side is not the bottleneck.
 *
 *     frontend WORKLOAD --socket PATH --port N [--size N] [--depth N] [--gap-us N] [--seconds S]
 *     frontend WORKLOAD --floor …      the same against a minimal device in this process
 *
 * Runs one workload and prints one line of JSON; status 1 and {"error": …} when it cannot finish.
 * Sources: QEMU docs/interop/vhost-user.rst; VIRTIO 1.2, sections 2.7 (split virtqueues) and 5.3
 * (console). When it kicks, waits and asks for interrupts follows Linux' virtio_console: one
 * descriptor a buffer, a look at avail_event after every buffer, used_event moved on every reap.
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
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define QUEUE_SIZE 64 /* QEMU's default for a stock vhost-user device */
#define LARGEST_BUFFER 32768
#define CONTROL_BUFFER 4096
#define MEMORY_SIZE (8u << 20)
#define GUEST_BASE 0x40000000ull
#define SECOND 1000000000ull
#define PATIENCE (2 * SECOND) /* without any progress for this long, the device counts as hung */

enum { RX, TX, CONTROL_RX, CONTROL_TX, QUEUES };

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
    CPU_SET(cpu, &set);
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

#define MOST_SAMPLES (1u << 20)
static uint32_t samples[MOST_SAMPLES];
static unsigned sample_count;

static void add_sample(uint64_t nanoseconds) {
    if (sample_count < MOST_SAMPLES)
        samples[sample_count++] = nanoseconds > UINT32_MAX ? UINT32_MAX : (uint32_t)nanoseconds;
}

static int by_value(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static double percentile_us(unsigned percent) {
    return samples[(uint64_t)(sample_count - 1) * percent / 100] / 1e3;
}

static void print_latencies(uint64_t kicks, uint64_t calls) {
    if (!sample_count) fail("no round trip was completed");
    qsort(samples, sample_count, sizeof samples[0], by_value);
    printf("{\"count\": %u, \"p50_us\": %.3f, \"p99_us\": %.3f, \"max_us\": %.3f, "
           "\"kicks\": %lu, \"calls\": %lu}\n",
           sample_count, percentile_us(50), percentile_us(99), percentile_us(100),
           (unsigned long)kicks, (unsigned long)calls);
}

/* ---- the driver's side of a split virtqueue (VIRTIO 1.2, section 2.7) ---- */

#define DESC_WRITE 2
#define NO_NOTIFY 1

struct desc {
    uint64_t addr;
    uint32_t len;
    uint16_t flags, next;
};

struct avail {
    uint16_t flags;
    _Atomic uint16_t idx;
    uint16_t ring[QUEUE_SIZE];
    _Atomic uint16_t used_event;
};

struct used {
    _Atomic uint16_t flags, idx;
    struct { uint32_t id, len; } ring[QUEUE_SIZE];
    _Atomic uint16_t avail_event;
};

struct queue {
    struct desc *desc;
    struct avail *avail;
    struct used *used;
    bool event_idx;
    uint16_t next_avail, last_used;
    int kick, call;
    uint64_t kicks, calls;
};

/* Descriptor `id` lies in one buffer for good; this makes it available, and kicks if asked to. */
static void queue_put(struct queue *q, uint16_t id) {
    uint16_t before = q->next_avail++;
    q->avail->ring[before % QUEUE_SIZE] = id;
    atomic_store_explicit(&q->avail->idx, q->next_avail, memory_order_release);
    atomic_thread_fence(memory_order_seq_cst);
    bool wanted = q->event_idx ? atomic_load(&q->used->avail_event) == before
                               : !(atomic_load(&q->used->flags) & NO_NOTIFY);
    if (wanted) {
        if (write(q->kick, &(uint64_t){1}, 8) != 8) fail("a kick could not be written");
        q->kicks++;
    }
}

static bool queue_get(struct queue *q, uint16_t *id, uint32_t *len) {
    if (atomic_load_explicit(&q->used->idx, memory_order_acquire) == q->last_used) return false;
    *id = (uint16_t)q->used->ring[q->last_used % QUEUE_SIZE].id;
    *len = q->used->ring[q->last_used % QUEUE_SIZE].len;
    q->last_used++;
    if (q->event_idx) atomic_store(&q->avail->used_event, q->last_used);
    if (*id >= QUEUE_SIZE) fail("the device used descriptor %u, which does not exist", *id);
    return true;
}

/* Gives up, and leaves what is needed to tell whose wake-up was lost. */
static void queue_hangs(struct queue *q, const char *what, uint64_t bytes) {
    fail("%s stops after %lu bytes: available %u, used %u, seen %u; kick wanted at %u, call at %u",
         what, (unsigned long)bytes, q->next_avail, atomic_load(&q->used->idx), q->last_used,
         atomic_load(&q->used->avail_event), atomic_load(&q->avail->used_event));
}

static void queue_take_calls(struct queue *q) {
    uint64_t calls;
    if (read(q->call, &calls, 8) == 8) q->calls += calls;
}

/* Sleeps until an interrupt or `until`. queue_get has asked for it and must be tried after this. */
static void queue_sleep(struct queue *q, uint64_t until) {
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load(&q->used->idx) != q->last_used) return;
    uint64_t t = now();
    struct pollfd p = {q->call, POLLIN, 0};
    if (t < until && poll(&p, 1, (int)((until - t) / 1000000 + 1)) > 0) queue_take_calls(q);
}

/* ---- a guest: its memory and its queues ---- */

struct guest {
    int socket, memory_fd;
    char *memory;
    size_t allocated;
    uint64_t features, protocol_features;
    struct queue queues[QUEUES];
};

enum { MULTIPORT = 1, INDIRECT_DESC = 28, EVENT_IDX = 29, PROTOCOL_FEATURES = 30, VERSION_1 = 32 };

static bool has(uint64_t bits, int bit) { return bits >> bit & 1; }

static void *allocate(struct guest *g, size_t size) {
    char *start = g->memory + g->allocated;
    g->allocated += (size + 4095) & ~4095ul;
    if (g->allocated > MEMORY_SIZE) fail("the guest's memory is too small");
    return start;
}

static void *buffer_of(struct guest *g, struct desc *d) {
    return g->memory + (d->addr - GUEST_BASE);
}

/* Gives each of the queue's descriptors a buffer of `size` bytes. */
static void make_buffers(struct guest *g, int queue, uint32_t size) {
    struct queue *q = &g->queues[queue];
    bool to_guest = queue == RX || queue == CONTROL_RX;
    char *buffers = allocate(g, (size_t)size * QUEUE_SIZE);
    for (unsigned i = 0; i < QUEUE_SIZE; i++) {
        uint64_t addr = GUEST_BASE + (uint64_t)(buffers - g->memory) + (uint64_t)size * i;
        q->desc[i] = (struct desc){addr, size, to_guest ? DESC_WRITE : 0, 0};
    }
    for (uint16_t i = 0; to_guest && i < QUEUE_SIZE; i++) queue_put(q, i);
}

static void make_guest(struct guest *g) {
    memset(g, 0, sizeof *g);
    g->memory_fd = memfd_create("guest", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (g->memory_fd < 0 || ftruncate(g->memory_fd, MEMORY_SIZE)) fail("no memory for a guest");
    g->memory =
        mmap(NULL, MEMORY_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, g->memory_fd, 0);
    if (g->memory == MAP_FAILED) fail("no memory for a guest");
    for (int i = 0; i < QUEUES; i++) {
        struct queue *q = &g->queues[i];
        q->desc = allocate(g, sizeof *q->desc * QUEUE_SIZE);
        q->avail = allocate(g, sizeof *q->avail);
        q->used = allocate(g, sizeof *q->used);
        q->kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        q->call = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        if (q->kick < 0 || q->call < 0) fail("no event file descriptors left");
    }
}

/* Sends what is in transmit buffer `id` and spins until it is used, as Linux' hvc does. */
static void transmit_and_spin(struct guest *g, uint16_t id, uint32_t len) {
    struct queue *q = &g->queues[TX];
    uint16_t used_id;
    uint32_t used_len;
    q->desc[id].len = len;
    queue_put(q, id);
    for (uint64_t spins = 1, until = 0; !queue_get(q, &used_id, &used_len); spins++) {
        relax();
        if (spins % 65536) continue;
        if (!until) until = now() + PATIENCE;
        if (now() > until) fail("the device did not return a transmit buffer within 2 s");
    }
}

/* ---- the vhost-user frontend ---- */

enum {
    GET_FEATURES = 1, SET_FEATURES = 2, SET_OWNER = 3, SET_MEM_TABLE = 5, SET_VRING_NUM = 8,
    SET_VRING_ADDR = 9, SET_VRING_BASE = 10, SET_VRING_KICK = 12, SET_VRING_CALL = 13,
    GET_PROTOCOL_FEATURES = 15, SET_PROTOCOL_FEATURES = 16, SET_VRING_ENABLE = 18,
};
enum { PROTOCOL_MQ = 0, PROTOCOL_REPLY_ACK = 3, PROTOCOL_CONFIG = 9 };
enum { MESSAGE_VERSION = 1, MESSAGE_REPLY = 4, MESSAGE_NEED_REPLY = 8 };

struct header { uint32_t request, flags, size; };

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

static void connect_frontend(struct guest *g, const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct timeval patience = {PATIENCE / SECOND, 0};
    if (strlen(path) >= sizeof address.sun_path) fail("the socket's path is too long");
    strcpy(address.sun_path, path);
    g->socket = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(g->socket, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (connect(g->socket, (struct sockaddr *)&address, sizeof address))
        fail("cannot connect to the vhost-user socket: %s", strerror(errno));
}

static void negotiate(struct guest *g) {
    uint64_t offered = get(g, GET_FEATURES);
    if (!has(offered, VERSION_1)) fail("the device does not offer VERSION_1");
    g->features = offered & (1ull << VERSION_1 | 1ull << PROTOCOL_FEATURES | 1ull << EVENT_IDX |
                             1ull << INDIRECT_DESC | 1ull << MULTIPORT);
    if (has(offered, PROTOCOL_FEATURES)) {
        uint64_t known = 1 << PROTOCOL_MQ | 1 << PROTOCOL_REPLY_ACK | 1 << PROTOCOL_CONFIG;
        uint64_t wanted = get(g, GET_PROTOCOL_FEATURES) & known;
        set(g, SET_PROTOCOL_FEATURES, &wanted, 8, -1);
        g->protocol_features = wanted;
    }
    set(g, SET_OWNER, NULL, 0, -1);
    set(g, SET_FEATURES, &g->features, 8, -1);
    struct { uint32_t count, padding; uint64_t guest_addr, size, user_addr, offset; } table = {
        1, 0, GUEST_BASE, MEMORY_SIZE, (uintptr_t)g->memory, 0};
    set(g, SET_MEM_TABLE, &table, sizeof table, g->memory_fd);
}

static void start_queue(struct guest *g, uint32_t index) {
    struct queue *q = &g->queues[index];
    struct state { uint32_t index, num; };
    struct { uint32_t index, flags; uint64_t desc, used, avail, log; } addresses = {
        index, 0, (uintptr_t)q->desc, (uintptr_t)q->used, (uintptr_t)q->avail, 0};
    uint64_t with_fd = index;
    set(g, SET_VRING_NUM, &(struct state){index, QUEUE_SIZE}, 8, -1);
    set(g, SET_VRING_BASE, &(struct state){index, 0}, 8, -1);
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
    uint16_t id = q->next_avail % QUEUE_SIZE;
    uint32_t len;
    *(struct control *)buffer_of(g, &q->desc[id]) = (struct control){0, event, value};
    q->desc[id].len = sizeof(struct control);
    queue_put(q, id);
    for (uint64_t until = now() + PATIENCE; !queue_get(q, &id, &len); queue_sleep(q, until))
        if (now() > until) fail("the device does not answer on the control queue");
}

static void open_port(struct guest *g) {
    struct queue *q = &g->queues[CONTROL_RX];
    uint64_t until = now() + PATIENCE;
    send_control(g, DEVICE_READY, 1);
    for (bool open = false; !open;) {
        uint16_t id;
        uint32_t len;
        if (!queue_get(q, &id, &len)) {
            if (now() > until) fail("the device did not open port 0 within 2 s");
            queue_sleep(q, until);
            continue;
        }
        struct control message = *(struct control *)buffer_of(g, &q->desc[id]);
        queue_put(q, id);
        if (len < sizeof message || message.port != 0) continue;
        if (message.event == PORT_ADD) send_control(g, PORT_READY, 1);
        if (message.event == CONSOLE_PORT) send_control(g, PORT_OPEN, 1);
        open = message.event == PORT_OPEN && message.value == 1;
    }
}

/* Boots a guest on the device at `path`: negotiation, memory, queues, port 0 open. */
static void boot(struct guest *g, const char *path, uint32_t rx_size) {
    make_guest(g);
    connect_frontend(g, path);
    negotiate(g);
    bool multiport = has(g->features, MULTIPORT);
    for (int i = 0; i < (multiport ? QUEUES : CONTROL_RX); i++) {
        g->queues[i].event_idx = has(g->features, EVENT_IDX);
        make_buffers(g, i, i == RX ? rx_size : i == TX ? LARGEST_BUFFER : CONTROL_BUFFER);
    }
    for (int i = 0; i < (multiport ? QUEUES : CONTROL_RX); i++) start_queue(g, (uint32_t)i);
    if (multiport) open_port(g);
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

/* A byte from the guest to the client: from here on the device knows both. */
static void meet(struct guest *g, int client) {
    char byte = 0;
    *(char *)buffer_of(g, &g->queues[TX].desc[0]) = 'R';
    transmit_and_spin(g, 0, 1);
    if (recv(client, &byte, 1, 0) != 1) fail("the client gets nothing of what the guest writes");
    if (byte != 'R') fail("the client gets byte %d instead of what the guest writes", byte);
}

/* One end of a stream of pattern bytes, run as a thread of its own. */
struct stream {
    int fd, cpu;
    uint64_t position;         /* of the next byte */
    _Atomic uint64_t end;      /* where to stop; UINT64_MAX until it is known */
    uint64_t last_byte_at;     /* when that one came or went, in ns */
    uint64_t run_until;        /* a writer's own end, in ns */
    bool wrong;
};

static void *read_stream(void *argument) {
    struct stream *s = argument;
    static char data[65536];
    give_up_after(s->fd, 100);
    s->last_byte_at = now();
    while (s->position < s->end) {
        ssize_t count = recv(s->fd, data, sizeof data, 0);
        if (count > 0) {
            s->last_byte_at = now();
            if (memcmp(data, pattern_at(s->position), (size_t)count)) s->wrong = true;
            s->position += (uint64_t)count;
        } else if (count == 0 || now() > s->last_byte_at + PATIENCE)
            break;
    }
    return NULL;
}

static void *write_stream(void *argument) {
    struct stream *s = argument;
    pin(s->cpu);
    give_up_after(s->fd, 100);
    while (now() < s->run_until) {
        ssize_t count = send(s->fd, pattern_at(s->position), 65536, MSG_NOSIGNAL);
        if (count > 0) s->position += (uint64_t)count;
    }
    s->end = s->position;
    return NULL;
}

static pthread_t start(void *(*run)(void *), void *argument) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, run, argument)) fail("cannot start a thread");
    return thread;
}

/* ---- the floor: a minimal console device in this process ---- */

struct device {
    struct guest *guest;
    int client, cpu;
    _Atomic bool stop;
};

struct device_queue {
    struct queue *q; /* the driver's view: rings and file descriptors only */
    uint16_t next, used;
};

static bool device_has_work(struct device_queue *d) {
    return atomic_load_explicit(&d->q->avail->idx, memory_order_acquire) != d->next;
}

static void device_use(struct device_queue *d, uint16_t id, uint32_t len) {
    d->q->used->ring[d->used % QUEUE_SIZE].id = id;
    d->q->used->ring[d->used % QUEUE_SIZE].len = len;
    d->used++;
    d->next++;
}

static void device_publish(struct device_queue *d) {
    uint16_t before = atomic_load(&d->q->used->idx);
    if (before == d->used) return;
    atomic_store_explicit(&d->q->used->idx, d->used, memory_order_release);
    atomic_thread_fence(memory_order_seq_cst);
    uint16_t event = atomic_load(&d->q->avail->used_event);
    if ((uint16_t)(d->used - event - 1) < (uint16_t)(d->used - before))
        if (write(d->q->call, &(uint64_t){1}, 8) != 8) fail("a call could not be written");
}

static void *run_device(void *argument) {
    struct device *device = argument;
    struct guest *g = device->guest;
    struct device_queue rx = {&g->queues[RX], 0, 0}, tx = {&g->queues[TX], 0, 0};
    static char journal[QUEUE_SIZE * LARGEST_BUFFER];
    pin(device->cpu);
    uint64_t spin_until = 0;
    while (!device->stop) {
        size_t written = 0;
        while (device_has_work(&tx) && written + LARGEST_BUFFER <= sizeof journal) {
            uint16_t id = tx.q->avail->ring[tx.next % QUEUE_SIZE];
            struct desc d = tx.q->desc[id];
            memcpy(journal + written, buffer_of(g, &d), d.len);
            written += d.len;
            device_use(&tx, id, 0);
        }
        device_publish(&tx);
        for (size_t sent = 0; sent < written;) {
            ssize_t count = send(device->client, journal + sent, written - sent, MSG_NOSIGNAL);
            if (count < 0 && errno != EAGAIN) return NULL;
            if (count > 0) sent += (size_t)count;
        }
        if (written) spin_until = now() + 50000;
        if (now() < spin_until) {
            relax();
            continue;
        }
        size_t taken = 0;
        while (device_has_work(&rx)) {
            uint16_t id = rx.q->avail->ring[rx.next % QUEUE_SIZE];
            struct desc d = rx.q->desc[id];
            ssize_t count = recv(device->client, buffer_of(g, &d), d.len, MSG_DONTWAIT);
            if (count <= 0) break;
            device_use(&rx, id, (uint32_t)count);
            taken += (size_t)count;
        }
        device_publish(&rx);
        if (taken) continue;
        atomic_store(&tx.q->used->avail_event, tx.next);
        atomic_store(&rx.q->used->avail_event, rx.next);
        atomic_thread_fence(memory_order_seq_cst);
        bool room = device_has_work(&rx);
        if (device_has_work(&tx)) continue;
        struct pollfd fds[] = {{tx.q->kick, POLLIN, 0},
                               {room ? -1 : rx.q->kick, POLLIN, 0},
                               {room ? device->client : -1, POLLIN, 0}};
        poll(fds, 3, 100);
        uint64_t ignored;
        for (int i = 0; i < 2; i++)
            if (fds[i].revents && read(fds[i].fd, &ignored, 8) < 0 && errno != EAGAIN) return NULL;
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

/* ---- the workloads ---- */

struct options {
    const char *socket;
    int port, cpu, device_cpu, guests;
    uint32_t size, depth, gap_us;
    double seconds;
    bool floor;
};

static uint64_t after(double seconds) { return now() + (uint64_t)(seconds * (double)SECOND); }

/* 16-byte (--size) writes, one at a time, the guest spinning, --gap-us apart. What arrives is read
 * and compared between batches, so that no reader competes with the spinning guest. */
#define ROUNDTRIP_BATCH 1000

static uint64_t roundtrip_batch(struct guest *g, int client, const struct options *o,
                                uint64_t position, uint64_t until) {
    static char received[ROUNDTRIP_BATCH * 64];
    unsigned written = 0;
    for (unsigned i = 0; i < ROUNDTRIP_BATCH && now() < until; i++, written += o->size) {
        uint16_t id = (uint16_t)(i % QUEUE_SIZE);
        memcpy(buffer_of(g, &g->queues[TX].desc[id]), pattern_at(position + written), o->size);
        uint64_t begin = now();
        transmit_and_spin(g, id, o->size);
        add_sample(now() - begin);
        if (o->gap_us) busy_wait(o->gap_us * 1000ull);
    }
    if (recv(client, received, written, MSG_WAITALL) != (ssize_t)written)
        fail("the client missed bytes");
    if (memcmp(received, pattern_at(position), written)) fail("the client got wrong bytes");
    return position + written;
}

static void roundtrip(struct guest *g, int client, const struct options *o) {
    uint64_t position = 0;
    if (o->size > 64) fail("a round trip has at most 64 bytes");
    for (uint64_t until = after(o->seconds / 5); now() < until;)
        position = roundtrip_batch(g, client, o, position, until);
    sample_count = 0;
    for (uint64_t until = after(o->seconds); now() < until;)
        position = roundtrip_batch(g, client, o, position, until);
    queue_take_calls(&g->queues[TX]);
    print_latencies(g->queues[TX].kicks, g->queues[TX].calls);
}

/* --size byte writes, up to --depth of them under way; the guest sleeps when all are. */
static void write_for(struct guest *g, struct stream *reader, const struct options *o,
                      uint64_t until) {
    struct queue *q = &g->queues[TX];
    uint64_t position = reader->position, progress_at = now();
    uint16_t free_ids[QUEUE_SIZE], id;
    uint32_t free_count = o->depth, len;
    for (uint16_t i = 0; i < o->depth; i++) free_ids[i] = i;
    reader->end = UINT64_MAX;
    pthread_t thread = start(read_stream, reader);
    while (now() < until || free_count < o->depth) {
        while (queue_get(q, &id, &len)) {
            free_ids[free_count++] = id;
            progress_at = now();
        }
        if (now() > progress_at + PATIENCE)
            queue_hangs(q, "output", position);
        if (free_count && now() < until) {
            id = free_ids[--free_count];
            memcpy(buffer_of(g, &q->desc[id]), pattern_at(position), o->size);
            q->desc[id].len = o->size;
            position += o->size;
            queue_put(q, id);
        } else if (free_count < o->depth)
            queue_sleep(q, progress_at + PATIENCE);
    }
    reader->end = position;
    pthread_join(thread, NULL);
    if (reader->position != position)
        fail("the client got %lu of %lu bytes", (unsigned long)reader->position,
             (unsigned long)position);
    if (reader->wrong) fail("the client got wrong bytes");
}

static void output(struct guest *g, int client, const struct options *o) {
    struct queue *q = &g->queues[TX];
    struct stream reader = {.fd = client, .cpu = o->cpu};
    if (!o->depth || o->depth > QUEUE_SIZE || o->size > LARGEST_BUFFER)
        fail("at most 64 writes of 32768 bytes");
    write_for(g, &reader, o, after(o->seconds / 5));
    uint64_t warm_up = reader.position, kicks = q->kicks, calls = q->calls, begin = now();
    write_for(g, &reader, o, after(o->seconds));
    queue_take_calls(q);
    uint64_t bytes = reader.position - warm_up;
    double seconds = (double)(reader.last_byte_at - begin) / 1e9;
    printf("{\"bytes\": %lu, \"seconds\": %.6f, \"mb_s\": %.3f, \"chains_s\": %.0f, "
           "\"kicks\": %lu, \"calls\": %lu, \"all_bytes\": %lu}\n",
           (unsigned long)bytes, seconds, (double)bytes / 1e6 / seconds,
           (double)(bytes / o->size) / seconds, (unsigned long)(q->kicks - kicks),
           (unsigned long)(q->calls - calls), (unsigned long)reader.position);
}

/* The client writes as fast as it can; the guest has 64 buffers of --size bytes to receive it. */
static void read_for(struct guest *g, struct stream *writer, double seconds) {
    struct queue *q = &g->queues[RX];
    uint64_t position = writer->position, progress_at = now();
    uint16_t id;
    uint32_t len;
    writer->end = UINT64_MAX;
    writer->run_until = after(seconds);
    pthread_t thread = start(write_stream, writer);
    while (position < writer->end) {
        if (!queue_get(q, &id, &len)) {
            if (now() > progress_at + PATIENCE)
                queue_hangs(q, "input", position);
            queue_sleep(q, now() + SECOND / 10);
            continue;
        }
        progress_at = now();
        if (len > q->desc[id].len) fail("the device used %u bytes of a smaller buffer", len);
        if (memcmp(buffer_of(g, &q->desc[id]), pattern_at(position), len))
            fail("the guest got wrong bytes after %lu", (unsigned long)position);
        position += len;
        queue_put(q, id);
    }
    writer->last_byte_at = now();
    pthread_join(thread, NULL);
}

static void input(struct guest *g, int client, const struct options *o) {
    struct queue *q = &g->queues[RX];
    struct stream writer = {.fd = client, .cpu = o->cpu};
    read_for(g, &writer, o->seconds / 5);
    uint64_t warm_up = writer.position, begin = now();
    uint64_t kicks = q->kicks, calls = q->calls;
    read_for(g, &writer, o->seconds);
    queue_take_calls(q);
    uint64_t bytes = writer.position - warm_up;
    double seconds = (double)(writer.last_byte_at - begin) / 1e9;
    printf("{\"bytes\": %lu, \"seconds\": %.6f, \"mb_s\": %.3f, \"kicks\": %lu, \"calls\": %lu, "
           "\"all_bytes\": %lu}\n",
           (unsigned long)bytes, seconds, (double)bytes / 1e6 / seconds,
           (unsigned long)(q->kicks - kicks), (unsigned long)(q->calls - calls),
           (unsigned long)writer.position);
}

/* One key at a time, --gap-us apart, everybody asleep in between; the guest echoes it. */
struct typist {
    int fd;
    uint32_t gap_us;
    uint64_t until;
    _Atomic bool done;
    bool failed;
};

static void *type(void *argument) {
    struct typist *t = argument;
    for (unsigned i = 0; now() < t->until; i++) {
        struct timespec gap = {t->gap_us / 1000000, t->gap_us % 1000000 * 1000};
        char key = (char)('a' + i % 26), echo = 0;
        nanosleep(&gap, NULL);
        uint64_t begin = now();
        if (send(t->fd, &key, 1, MSG_NOSIGNAL) != 1 || recv(t->fd, &echo, 1, 0) != 1 ||
            echo != key) {
            t->failed = true;
            break;
        }
        if (i >= 5) add_sample(now() - begin);
    }
    t->done = true;
    return NULL;
}

static void echo(struct guest *g, int client, const struct options *o) {
    struct queue *rx = &g->queues[RX], *tx = &g->queues[TX];
    struct typist typist = {.fd = client, .gap_us = o->gap_us, .until = after(o->seconds)};
    pthread_t thread = start(type, &typist);
    uint16_t id;
    uint32_t len;
    while (!typist.done) {
        if (!queue_get(rx, &id, &len)) {
            queue_sleep(rx, now() + SECOND / 10);
            continue;
        }
        if (len > CONTROL_BUFFER) fail("the device used more bytes than a key has");
        memcpy(buffer_of(g, &tx->desc[0]), buffer_of(g, &rx->desc[id]), len);
        queue_put(rx, id);
        if (len) transmit_and_spin(g, 0, len);
    }
    pthread_join(thread, NULL);
    if (typist.failed) fail("no echo of key %u", sample_count + 6);
    queue_take_calls(rx);
    print_latencies(tx->kicks + rx->kicks, rx->calls);
}

/* --guests guests with a client each that do nothing until standard input ends. */
static void idle(const struct options *o) {
    for (int i = 0; i < o->guests; i++) {
        struct guest *g = malloc(sizeof *g);
        char path[256];
        snprintf(path, sizeof path, "%s%d", o->socket, i);
        boot(g, path, CONTROL_BUFFER);
        meet(g, connect_client((uint16_t)(o->port + i)));
    }
    printf("{\"guests\": %d}\n", o->guests);
    fflush(stdout);
    while (getchar() != EOF) {}
}

/* What a TCP connection over loopback carries from one CPU to the other, checked as above. */
static void copy(const struct options *o) {
    int ends[2];
    connect_pair(ends);
    struct stream writer = {.fd = ends[1], .cpu = o->device_cpu, .end = UINT64_MAX};
    struct stream reader = {.fd = ends[0], .cpu = o->cpu, .end = UINT64_MAX};
    uint64_t begin = now();
    writer.run_until = after(o->seconds);
    pthread_t writing = start(write_stream, &writer), reading = start(read_stream, &reader);
    pthread_join(writing, NULL);
    reader.end = writer.position;
    pthread_join(reading, NULL);
    if (reader.wrong || reader.position != writer.position) fail("the socket lost bytes");
    double seconds = (double)(reader.last_byte_at - begin) / 1e9;
    printf("{\"bytes\": %lu, \"seconds\": %.6f, \"mb_s\": %.3f}\n",
           (unsigned long)reader.position, seconds, (double)reader.position / 1e6 / seconds);
}

static void run(const char *workload, const struct options *o) {
    struct { const char *name; void (*run)(struct guest *, int, const struct options *); } all[] = {
        {"roundtrip", roundtrip}, {"output", output}, {"input", input}, {"echo", echo}};
    static struct guest g;
    struct device device = {.guest = &g, .cpu = o->device_cpu};
    pthread_t device_thread = 0;
    int ends[2];
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        if (strcmp(workload, all[i].name)) continue;
        uint32_t rx_size = all[i].run == input ? o->size : CONTROL_BUFFER;
        if (!rx_size || rx_size > LARGEST_BUFFER) fail("a buffer has 1 to 32768 bytes");
        if (o->floor) {
            make_guest(&g);
            g.queues[RX].event_idx = g.queues[TX].event_idx = true;
            make_buffers(&g, RX, rx_size);
            make_buffers(&g, TX, LARGEST_BUFFER);
            connect_pair(ends);
            device.client = ends[1];
            device_thread = start(run_device, &device);
        } else {
            char path[256];
            snprintf(path, sizeof path, "%s0", o->socket);
            boot(&g, path, rx_size);
            ends[0] = connect_client((uint16_t)o->port);
        }
        meet(&g, ends[0]);
        all[i].run(&g, ends[0], o);
        device.stop = true;
        if (o->floor) pthread_join(device_thread, NULL);
        return;
    }
    fail("there is no workload of that name");
}

int main(int argc, char **argv) {
    struct options o = {
        .cpu = -1, .device_cpu = -1, .guests = 1, .size = 16, .depth = 1, .seconds = 1};
    enum { SOCKET, PORT, CPU, DEVICE_CPU, GUESTS, SIZE, DEPTH, GAP, SECONDS, FLOOR };
    struct option names[] = {
        {"socket", 1, 0, SOCKET}, {"port", 1, 0, PORT}, {"cpu", 1, 0, CPU},
        {"device-cpu", 1, 0, DEVICE_CPU}, {"guests", 1, 0, GUESTS}, {"size", 1, 0, SIZE},
        {"depth", 1, 0, DEPTH}, {"gap-us", 1, 0, GAP}, {"seconds", 1, 0, SECONDS},
        {"floor", 0, 0, FLOOR}, {0}};
    for (int option; (option = getopt_long(argc, argv, "", names, NULL)) >= 0;) switch (option) {
        case SOCKET: o.socket = optarg; break;
        case PORT: o.port = atoi(optarg); break;
        case CPU: o.cpu = atoi(optarg); break;
        case DEVICE_CPU: o.device_cpu = atoi(optarg); break;
        case GUESTS: o.guests = atoi(optarg); break;
        case SIZE: o.size = (uint32_t)atoi(optarg); break;
        case DEPTH: o.depth = (uint32_t)atoi(optarg); break;
        case GAP: o.gap_us = (uint32_t)atoi(optarg); break;
        case SECONDS: o.seconds = atof(optarg); break;
        case FLOOR: o.floor = true; break;
        default: return 2;
        }
    if (optind + 1 != argc) fail("name one workload");
    const char *workload = argv[optind];
    if (!o.floor && strcmp(workload, "copy") && (!o.socket || !o.port))
        fail("--socket and --port, or --floor");
    pin(o.cpu);
    make_pattern();
    if (!strcmp(workload, "idle")) idle(&o);
    else if (!strcmp(workload, "copy")) copy(&o);
    else run(workload, &o);
    return 0;
}
