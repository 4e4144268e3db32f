/* Watching calls from C, which adds no frame to the program's tracebacks and takes little time.
 *
 * A Watch replaces a special method in the namespace of a class (Module.__call__, the loader's
 * __next__) or a function in the namespace of a module. When it is called, it calls the original,
 * and its Log records when the call begins and ends. The log packs each event into a few bytes
 * (`PackedTrace` of wire/lines.py). Python writes these bytes to the record from time to time, and
 * they are decoded when the record is read. The log also keeps the events unpacked while
 * `keeps_events` is set, and calls Python at each event while `live` is set.
 *
 * Attribute lookup on the class returns the original, so Dynamo, inspect and FX see what they would
 * see without the watch. A watch that is pickled by value (cloudpickle does so with classes of
 * __main__) becomes the original.
 *
 * The file uses the limited API of CPython 3.10, so one binary works with every later version.
 */
#include <Python.h>
#include <structmember.h>
#include <stdint.h>
#include <string.h>

#ifdef _WIN32
#include <windows.h>
static int64_t now_ns(void)
{
    LARGE_INTEGER count, frequency;
    QueryPerformanceCounter(&count);
    QueryPerformanceFrequency(&frequency);
    return (int64_t)((double)count.QuadPart * 1e9 / (double)frequency.QuadPart);
}
#else
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
static int64_t now_ns(void) /* the clock behind time.perf_counter_ns */
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}
#endif

/* The phases and the kinds of events are those of wire/turns.py. */
enum { DATA = 0, TRANSFER = 1, FORWARD = 2, BACKWARD = 4, OPTIMIZER = 5, PHASES = 7 };
enum { BEGIN = 0, END = 1, USAGE = 2, NOTE = 3 };

typedef struct {
    int kind;  /* BEGIN, END, USAGE or NOTE */
    int phase; /* for NOTE: which note */
    int flags; /* for FORWARD BEGIN: 1 gradients are recorded, 2 the module is in training mode; for
                  BACKWARD BEGIN: 1 a loss was appended to `losses`; for DATA END: 1 it raised */
    int64_t value[3]; /* for BEGIN and END: the time in ns, then the address of the loader or its
                         iterator (DATA), the module (FORWARD) or the optimizer (OPTIMIZER), which
                         at an END is 0 for a module; for USAGE: minor page faults, major page
                         faults, peak resident set in bytes; for NOTE: the value of the note */
} Event;

enum { MAX_PACKED_BYTES = 1 + 3 * 10 }; /* the size of the longest packed event */

/* The least time between two calls of getrusage. A call between two steps takes some 15
 * microseconds, which is too much for steps of a millisecond. */
enum { USAGE_PERIOD_NS = 20000000 };

/* The names of attributes that are looked up at each step. A log keeps them as interned strings. */
enum { IS_CPU, TRAINING, IS_VIEW, ITEM, NAMES };
static const char *const name_strings[NAMES] = {"is_cpu", "training", "_is_view", "item"};

/* These structures come from the DLPack specification, version 1.3: the memory layout of a tensor,
 * and the table of C functions that a tensor type provides in the capsule
 * __dlpack_c_exchange_api__. */
enum { DLPACK_MAJOR = 1, DL_CPU = 1, DL_FLOAT = 2 };
static const char exchange_name[] = "dlpack_exchange_api";
typedef struct {
    void *data;
    struct {
        int32_t type, id;
    } device;
    int32_t ndim;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} DLTensor;
typedef int (*Describe)(void *tensor, DLTensor *description);
typedef struct {
    uint32_t major, minor;
    void *previous;
    void *allocate, *export_managed, *import_managed;
    Describe describe; /* may be NULL; does not synchronise; the tensor still owns the memory */
    void *current_stream;
} Exchange;

typedef struct {
    PyObject_HEAD
    Event *events; /* returned by `take_events`; appended to while `keeps_events` is set */
    Py_ssize_t count, capacity;
    unsigned char *packed; /* returned by `take_packed` */
    Py_ssize_t packed_bytes, packed_capacity;
    int64_t last_ns, last_id[PHASES], last_usage[3], last_note; /* for delta encoding */
    int depth[PHASES];
    uint64_t thread;   /* the thread whose events are recorded */
    int64_t read_ns;   /* when `reader` was last called */
    int64_t usage_ns;  /* when USAGE was last recorded */
    char has_computed; /* whether `thread` has made a forward, backward or optimizer call */
    char has_stepped;  /* whether an optimizer has stepped; USAGE is then recorded at steps only */
    char awake, keeps_events, live, wraps_inference;
    long long read_period_ns;
    PyObject *reader;          /* called without arguments when the log is to be read */
    PyObject *check_root;      /* called with a module at its first few outermost calls; returns
                                  whether it is a root */
    PyObject *roots;           /* dict from id(module) to whether it is a root */
    PyObject *is_grad_enabled; /* torch.is_grad_enabled */
    PyObject *is_traced; /* whether torch traces the program, as capture.is_traced tells */
    PyObject *tensor_type;     /* torch.Tensor */
    PyObject *script_type;     /* torch.jit.ScriptModule */
    PyObject *disable_modes;   /* torch._C.DisableTorchFunction */
    PyObject *start_loss_copy; /* called with a loss tensor that is not on the CPU */
    PyObject *losses;          /* list with one float or result of start_loss_copy for each
                                  BACKWARD BEGIN that has the flag 1 */
    PyObject *wrap_forward;    /* None, or called with original, module, args, kwargs */
    PyObject *strip_frames;    /* called with a traceback; returns it without flatout's frames */
    PyObject *before_optimizer_step, *after_optimizer_step; /* None, or called with the optimizer */
    Describe describe; /* returns the layout of a tensor; NULL if torch does not provide it */
    PyObject *names[NAMES];
} Log;

/* Return the number of values of an event, as wire/packing.py does. */
static int value_count(int kind, int phase)
{
    if (kind == USAGE)
        return 3;
    return kind != NOTE && (phase == DATA || phase == FORWARD || phase == OPTIMIZER) ? 2 : 1;
}

/* Return fresh memory, or NULL. It comes from the system: in the program's heap, a block that is as
 * old as the log would keep the allocator from joining what lies on both sides of it, or from
 * returning it to the system, as it does in the program alone. */
static void *map_memory(size_t bytes)
{
#ifdef _WIN32
    return VirtualAlloc(NULL, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
#else
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
#endif
}

/* Free what map_memory has returned. */
static void unmap_memory(void *memory, size_t bytes)
{
    if (memory == NULL)
        return;
#ifdef _WIN32
    (void)bytes;
    VirtualFree(memory, 0, MEM_RELEASE);
#else
    munmap(memory, bytes);
#endif
}

/* Return a block of mapped memory, enlarged if necessary, or NULL with an exception set. */
static void *grow(void *memory, Py_ssize_t *capacity, Py_ssize_t needed, size_t size)
{
    if (needed <= *capacity)
        return memory;
    Py_ssize_t larger = 2 * needed + 16384;
    void *moved = map_memory(larger * size);
    if (moved == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    if (memory != NULL)
        memcpy(moved, memory, *capacity * size);
    unmap_memory(memory, *capacity * size);
    *capacity = larger;
    return moved;
}

/* Append a packed event: one byte for kind, phase and flags, then each value as the difference to
 * the last value of its kind, in zigzag encoding and groups of 7 bits (LEB128). */
static void append_packed(Log *log, const Event *e)
{
    unsigned char *out = log->packed + log->packed_bytes;
    *out++ = (unsigned char)(e->kind | e->phase << 2 | e->flags << 5);
    for (int i = 0; i < value_count(e->kind, e->phase); i++) {
        int64_t *last = e->kind == NOTE    ? &log->last_note
                        : e->kind == USAGE ? &log->last_usage[i]
                        : i == 0           ? &log->last_ns
                                           : &log->last_id[e->phase];
        uint64_t change = (uint64_t)e->value[i] - (uint64_t)*last;
        *last = e->value[i];
        uint64_t rest = change << 1 ^ (change >> 63 ? ~(uint64_t)0 : 0);
        for (; rest > 127; rest >>= 7)
            *out++ = (unsigned char)(rest | 128);
        *out++ = (unsigned char)rest;
    }
    log->packed_bytes = out - log->packed;
}

static int append_event(Log *log, int kind, int phase, int flags, int64_t first, int64_t second,
                        int64_t third)
{
    Event event = {kind, phase, flags, {first, second, third}};
    Py_ssize_t needed = log->packed_bytes + MAX_PACKED_BYTES;
    void *memory = grow(log->packed, &log->packed_capacity, needed, 1);
    if (memory == NULL)
        return -1;
    log->packed = memory;
    if (log->keeps_events) {
        memory = grow(log->events, &log->capacity, log->count + 1, sizeof(Event));
        if (memory == NULL)
            return -1;
        log->events = memory;
        log->events[log->count++] = event;
    }
    append_packed(log, &event);
    return 0;
}

/* Record the resource usage of the process, if USAGE_PERIOD_NS have passed since the last time. */
static int append_usage(Log *log, int64_t time_ns)
{
#ifdef _WIN32
    (void)log;
    (void)time_ns;
    return 0;
#else
    if (time_ns - log->usage_ns < USAGE_PERIOD_NS)
        return 0;
    log->usage_ns = time_ns;
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
#ifdef __APPLE__
    const int64_t unit = 1; /* getrusage(2) of each system */
#else
    const int64_t unit = 1024;
#endif
    return append_event(log, USAGE, 0, 0, usage.ru_minflt, usage.ru_majflt, usage.ru_maxrss * unit);
#endif
}

/* Call the reader if it is due. Return -1 with an exception set if a signal handler of the program
 * raised during the call, else 0. */
static int call_reader_if_due(Log *log, int64_t time_ns)
{
    if (!log->live && time_ns - log->read_ns < log->read_period_ns)
        return 0;
    log->read_ns = time_ns;
    PyObject *result = PyObject_CallObject(log->reader, NULL);
    Py_XDECREF(result);
    return result == NULL ? -1 : 0;
}

#define THREAD_CAPSULE "flatout.watched_thread"

/* Return a number of the calling thread that no later thread gets. (An identifier such as that of
 * `threading.get_ident` goes to a new thread once the old one has ended.) */
static uint64_t number_of_thread(void)
{
    return PyThreadState_GetID(PyThreadState_Get());
}

/* Called when the state of a thread is cleared, at its end. */
static void forget_thread(PyObject *capsule)
{
    Log *log = PyCapsule_GetPointer(capsule, THREAD_CAPSULE);
    if (log->thread == (uint64_t)(uintptr_t)PyCapsule_GetContext(capsule))
        log->has_computed = 0;
    Py_DECREF(log);
}

/* Watch the calling thread until it ends. */
static void follow_thread(Log *log, uint64_t thread)
{
    log->thread = thread;
    PyObject *of_thread = PyThreadState_GetDict(); /* borrowed */
    PyObject *capsule = PyCapsule_New(log, THREAD_CAPSULE, forget_thread);
    if (capsule != NULL) {
        Py_INCREF(log);
        PyCapsule_SetContext(capsule, (void *)(uintptr_t)thread);
        if (of_thread != NULL)
            PyDict_SetItemString(of_thread, THREAD_CAPSULE, capsule);
        Py_DECREF(capsule);
    }
    PyErr_Clear();
    log->has_computed = 1;
}

/* Return whether the events of the calling thread are ignored. Only one thread is watched: at first
 * the thread that imported torch, then the first thread that makes a forward call, a backward call
 * or an optimizer step (a thread that only prefetches batches makes none), and once that one has
 * ended the next one that does. */
static int is_ignored_thread(Log *log, int phase)
{
    uint64_t thread = number_of_thread();
    int computes = phase == FORWARD || phase == BACKWARD || phase == OPTIMIZER;
    if (computes && !log->has_computed)
        follow_thread(log, thread);
    return log->thread != thread;
}

static PyObject *log_take_events(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    Log *log = (Log *)self;
    PyObject *list = PyList_New(log->count);
    if (list == NULL)
        return NULL;
    for (Py_ssize_t i = 0; i < log->count; i++) {
        Event *e = &log->events[i];
        PyObject *item = Py_BuildValue("(iiiLLL)", e->kind, e->phase, e->flags,
                                       (long long)e->value[0], (long long)e->value[1],
                                       (long long)e->value[2]);
        if (item == NULL || PyList_SetItem(list, i, item) < 0) {
            Py_DECREF(list);
            return NULL;
        }
    }
    log->count = 0;
    return list;
}

static PyObject *log_take_packed(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    Log *log = (Log *)self;
    PyObject *bytes = PyBytes_FromStringAndSize((const char *)log->packed, log->packed_bytes);
    if (bytes != NULL)
        log->packed_bytes = 0;
    return bytes;
}

static PyObject *log_append(PyObject *self, PyObject *args)
{
    int kind, phase, flags;
    long long first, second = 0, third = 0;
    if (!PyArg_ParseTuple(args, "iiiL|LL", &kind, &phase, &flags, &first, &second, &third) ||
        append_event((Log *)self, kind, phase, flags, first, second, third) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *log_set_exchange_api(PyObject *self, PyObject *capsule)
{
    Exchange *exchange = NULL;
    if (PyCapsule_IsValid(capsule, exchange_name))
        exchange = PyCapsule_GetPointer(capsule, exchange_name);
    int usable = exchange != NULL && exchange->major == DLPACK_MAJOR;
    ((Log *)self)->describe = usable ? exchange->describe : NULL;
    return PyBool_FromLong(usable && exchange->describe != NULL);
}

static PyObject *log_reset(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    Log *log = (Log *)self;
    log->count = 0;
    log->packed_bytes = 0;
    log->last_ns = log->last_note = log->usage_ns = 0;
    memset(log->last_id, 0, sizeof(log->last_id));
    memset(log->last_usage, 0, sizeof(log->last_usage));
    log->has_computed = 0;
    log->has_stepped = 0;
    log->thread = number_of_thread();
    memset(log->depth, 0, sizeof(log->depth));
    Py_RETURN_NONE;
}

static int log_init(PyObject *self, PyObject *args, PyObject *kwargs)
{
    Log *log = (Log *)self;
    (void)args;
    (void)kwargs;
    for (int i = 0; i < NAMES; i++) {
        Py_XDECREF(log->names[i]);
        log->names[i] = PyUnicode_InternFromString(name_strings[i]);
        if (log->names[i] == NULL)
            return -1;
    }
    return 0;
}

static void log_dealloc(PyObject *self)
{
    Log *log = (Log *)self;
    PyTypeObject *type = Py_TYPE(self);
    unmap_memory(log->events, log->capacity * sizeof(Event));
    unmap_memory(log->packed, log->packed_capacity);
    Py_XDECREF(log->reader);
    Py_XDECREF(log->check_root);
    Py_XDECREF(log->roots);
    Py_XDECREF(log->is_grad_enabled);
    Py_XDECREF(log->is_traced);
    Py_XDECREF(log->tensor_type);
    Py_XDECREF(log->script_type);
    Py_XDECREF(log->disable_modes);
    Py_XDECREF(log->start_loss_copy);
    Py_XDECREF(log->losses);
    Py_XDECREF(log->wrap_forward);
    Py_XDECREF(log->strip_frames);
    Py_XDECREF(log->before_optimizer_step);
    Py_XDECREF(log->after_optimizer_step);
    for (int i = 0; i < NAMES; i++)
        Py_XDECREF(log->names[i]);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static PyMethodDef log_methods[] = {
    {"take_events", log_take_events, METH_NOARGS,
     "Remove and return the events kept since the last call, as tuples."},
    {"take_packed", log_take_packed, METH_NOARGS,
     "Remove and return the events since the last call, packed."},
    {"append", log_append, METH_VARARGS,
     "Append an event: kind, phase, flags and up to three values."},
    {"set_exchange_api", log_set_exchange_api, METH_O,
     "Use a DLPack exchange API to read losses; returns False if it cannot be used."},
    {"reset", log_reset, METH_NOARGS, "Start again with this thread (also after a fork)."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef log_members[] = {
    {"awake", T_BOOL, offsetof(Log, awake), 0, "Whether calls are recorded."},
    {"keeps_events", T_BOOL, offsetof(Log, keeps_events), 0,
     "Whether events are also kept for `take_events`."},
    {"wraps_inference", T_BOOL, offsetof(Log, wraps_inference), 0,
     "Whether `wrap_forward` is also called for calls that record no gradients."},
    {"live", T_BOOL, offsetof(Log, live), 0, "Whether the reader is called at each event."},
    {"read_period_ns", T_LONGLONG, offsetof(Log, read_period_ns), 0,
     "The least time between two calls of the reader while `live` is not set."},
    {"reader", T_OBJECT, offsetof(Log, reader), 0, NULL},
    {"check_root", T_OBJECT, offsetof(Log, check_root), 0, NULL},
    {"roots", T_OBJECT, offsetof(Log, roots), 0, NULL},
    {"is_grad_enabled", T_OBJECT, offsetof(Log, is_grad_enabled), 0, NULL},
    {"is_traced", T_OBJECT, offsetof(Log, is_traced), 0, NULL},
    {"tensor_type", T_OBJECT, offsetof(Log, tensor_type), 0, NULL},
    {"script_type", T_OBJECT, offsetof(Log, script_type), 0, NULL},
    {"disable_modes", T_OBJECT, offsetof(Log, disable_modes), 0, NULL},
    {"start_loss_copy", T_OBJECT, offsetof(Log, start_loss_copy), 0, NULL},
    {"losses", T_OBJECT, offsetof(Log, losses), 0, NULL},
    {"wrap_forward", T_OBJECT, offsetof(Log, wrap_forward), 0, NULL},
    {"strip_frames", T_OBJECT, offsetof(Log, strip_frames), 0, NULL},
    {"before_optimizer_step", T_OBJECT, offsetof(Log, before_optimizer_step), 0, NULL},
    {"after_optimizer_step", T_OBJECT, offsetof(Log, after_optimizer_step), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot log_slots[] = {
    {Py_tp_doc, "The events that Watch and StepHook objects record, until Python takes them."},
    {Py_tp_init, log_init},
    {Py_tp_dealloc, log_dealloc},
    {Py_tp_methods, log_methods},
    {Py_tp_members, log_members},
    {0, NULL},
};

static PyType_Spec log_spec = {
    .name = "flatout.intercept._watch.Log",
    .basicsize = sizeof(Log),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = log_slots,
};

typedef struct {
    PyObject_HEAD
    Log *log;
    int phase; /* the phase of the recorded events; -1: only `before` is called */
    PyObject *original; /* the replaced function; NULL if `owner` inherits the function */
    PyObject *owner; /* the class that has the watch in its namespace; NULL for a Python module */
    PyObject *name;
    PyObject *before; /* None, or called with the instance when a call begins */
    PyObject *method_type;
    PyObject *weak_references;
} Watch;

/* Return a new reference to the function that a call would reach now without the watch, for
 * instances of `type` (NULL: of the owner). */
static PyObject *find_original(Watch *watch, PyObject *type)
{
    if (watch->original != NULL) {
        Py_INCREF(watch->original);
        return watch->original;
    }
    if (watch->owner == NULL) {
        PyErr_SetString(PyExc_ReferenceError, "the class of this method is being freed");
        return NULL;
    }
    if (type == NULL || !PyType_Check(type) ||
        !PyType_IsSubtype((PyTypeObject *)type, (PyTypeObject *)watch->owner))
        type = watch->owner;
    /* Look up the method after the owner in the resolution order of `type`. The method may have
     * changed since the watch was created: a subclass may have several bases, or the program may
     * have set a method on a base class. */
    PyObject *rest =
        PyObject_CallFunctionObjArgs((PyObject *)&PySuper_Type, watch->owner, type, NULL);
    if (rest == NULL)
        return NULL;
    PyObject *original = PyObject_GetAttr(rest, watch->name);
    Py_DECREF(rest);
    return original;
}

static int is_true_attribute(PyObject *object, PyObject *name)
{
    PyObject *value = PyObject_GetAttr(object, name);
    if (value == NULL) {
        PyErr_Clear();
        return 0;
    }
    int result = PyObject_IsTrue(value);
    Py_DECREF(value);
    if (result < 0) {
        PyErr_Clear();
        return 0;
    }
    return result;
}

/* Return whether a module is in training mode, without calling attribute access that its class
 * defines. A script module stores the attribute in C++. */
static int is_training(Log *log, PyObject *module)
{
    PyObject *attributes = PyObject_GenericGetDict(module, NULL);
    if (attributes == NULL) {
        PyErr_Clear();
        return 0;
    }
    PyObject *value = PyDict_GetItemWithError(attributes, log->names[TRAINING]);
    int result = value == Py_True;
    Py_DECREF(attributes);
    PyErr_Clear();
    if (value == NULL && log->script_type != NULL &&
        PyType_IsSubtype(Py_TYPE(module), (PyTypeObject *)log->script_type))
        return is_true_attribute(module, log->names[TRAINING]);
    return result;
}

/* Return 1 if the module is a root, 0 if not, -1 with an exception set. */
static int is_root(Log *log, PyObject *module)
{
    PyObject *key = PyLong_FromVoidPtr(module);
    if (key == NULL)
        return -1;
    PyObject *known = PyDict_GetItemWithError(log->roots, key);
    Py_DECREF(key);
    if (known != NULL)
        return known == Py_True;
    if (PyErr_Occurred())
        return -1;
    PyObject *result = PyObject_CallFunctionObjArgs(log->check_root, module, NULL);
    if (result == NULL)
        return -1;
    int root = PyObject_IsTrue(result);
    Py_DECREF(result);
    return root;
}

/* Return whether a tensor is no view. The memory of a view may hold the negated value (torch's lazy
 * negative bit). */
static int is_not_view(Log *log, PyObject *tensor)
{
    PyObject *is_view = PyObject_CallMethodObjArgs(tensor, log->names[IS_VIEW], NULL);
    PyErr_Clear();
    Py_XDECREF(is_view);
    return is_view == Py_False;
}

/* Return a new reference: to the result of `start_loss_copy` for a loss that is not on the CPU, else
 * to the float that `item` returns, or to None if `item` returns no real number. */
static PyObject *read_loss_by_call(Log *log, PyObject *tensor, int on_cpu)
{
    if (!on_cpu)
        return PyObject_CallFunctionObjArgs(log->start_loss_copy, tensor, NULL);
    PyObject *value = PyObject_CallMethodObjArgs(tensor, log->names[ITEM], NULL);
    int is_none = value == NULL ? PyErr_ExceptionMatches(PyExc_RuntimeError) /* several elements */
                                : !PyFloat_Check(value);                     /* complex */
    if (!is_none)
        return value;
    PyErr_Clear();
    Py_XDECREF(value);
    Py_RETURN_NONE;
}

/* Return a new reference to the value of a loss: a float, the result of `start_loss_copy` for a
 * tensor that is not on the CPU, or None. A scalar on the CPU is read from its memory, because
 * `item` goes through torch's dispatcher, which takes 6 microseconds with a cold cache. */
static PyObject *read_loss(Log *log, PyObject *tensor)
{
    DLTensor loss;
    if (log->describe != NULL && log->describe(tensor, &loss) < 0) {
        PyErr_Clear();
        log->describe = NULL; /* DLPack does not support the device, and failing again is slow */
    }
    int known = log->describe != NULL;
    int bits = known && loss.device.type == DL_CPU && loss.ndim == 0 && loss.data != NULL &&
                       loss.dtype.code == DL_FLOAT && loss.dtype.lanes == 1
                   ? loss.dtype.bits
                   : 0;
    PyObject *disabled = PyObject_CallObject(log->disable_modes, NULL);
    PyObject *entered = disabled == NULL ? NULL : PyObject_CallMethod(disabled, "__enter__", NULL);
    if (entered == NULL) {
        Py_XDECREF(disabled);
        return NULL;
    }
    Py_DECREF(entered);
    PyObject *value;
    if ((bits == 32 || bits == 64) && is_not_view(log, tensor)) {
        const char *at = (const char *)loss.data + loss.byte_offset;
        value = PyFloat_FromDouble(bits == 32 ? *(const float *)at : *(const double *)at);
    } else {
        value = read_loss_by_call(log, tensor,
                            known ? loss.device.type == DL_CPU
                                  : is_true_attribute(tensor, log->names[IS_CPU]));
    }
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    PyObject *left =
        PyObject_CallMethod(disabled, "__exit__", "OOO", Py_None, Py_None, Py_None);
    Py_DECREF(disabled);
    if (left == NULL)
        PyErr_Clear();
    Py_XDECREF(left);
    PyErr_Restore(type, error, traceback);
    return value;
}

/* Append the loss that a backward call starts from to `losses`. Return 1 if there is one, 0 if
 * there is none, or -1 with an exception set. */
static int append_loss(Log *log, PyObject *args, PyObject *kwargs)
{
    /* torch.autograd.backward accumulates into .grad, torch.autograd.grad does not. */
    PyObject *accumulates =
        kwargs == NULL ? NULL : PyDict_GetItemString(kwargs, "accumulate_grad");
    if (accumulates != Py_True || PyTuple_Size(args) < 1)
        return 0;
    PyObject *tensors = PyTuple_GetItem(args, 0);
    if (!PyTuple_Check(tensors) || PyTuple_Size(tensors) != 1)
        return 0;
    PyObject *tensor = PyTuple_GetItem(tensors, 0);
    if ((PyObject *)Py_TYPE(tensor) != log->tensor_type)
        return 0; /* reading a tensor subclass (distributed, fake, ...) may have side effects */
    PyObject *value = read_loss(log, tensor);
    if (value == NULL)
        return -1;
    int appended = 0;
    if (value != Py_None)
        appended = PyList_Append(log->losses, value) < 0 ? -1 : 1;
    Py_DECREF(value);
    return appended;
}

/* Return whether torch traces the program at present, which runs backward passes of its own. */
static int is_traced(Log *log)
{
    PyObject *answer = log->is_traced == NULL ? NULL : PyObject_CallObject(log->is_traced, NULL);
    int traced = answer == Py_True;
    Py_XDECREF(answer);
    PyErr_Clear();
    return traced;
}

/* Return whether a call is to be recorded. */
static int is_recorded(Watch *watch, PyObject *target)
{
    Log *log = watch->log;
    const int *depth = log->depth;
    if (!log->awake || watch->phase < 0 || depth[DATA])
        return 0;
    switch (watch->phase) {
    case FORWARD:
        if (depth[FORWARD] || depth[BACKWARD] || target == NULL)
            return 0;
        break;
    case TRANSFER:
        if (target == NULL || !is_true_attribute(target, log->names[IS_CPU]))
            return 0;
        break;
    case BACKWARD:
        if (depth[BACKWARD] || is_traced(log))
            return 0;
        break;
    default:
        if (depth[watch->phase])
            return 0;
    }
    return !is_ignored_thread(log, watch->phase);
}

/* Record the end of a call. An exception that is set already stays set. Return -1 if an exception
 * is set, else 0. */
static int record_end(Watch *watch, PyObject *target)
{
    Log *log = watch->log;
    int64_t time_ns = now_ns();
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    int is_data = watch->phase == DATA;
    int failed = append_event(log, END, watch->phase, is_data && type != NULL, time_ns,
                              is_data ? (int64_t)(intptr_t)target : 0, 0);
    if (type != NULL) {
        if (failed)
            PyErr_Clear();
        PyErr_Restore(type, value, traceback);
        return -1;
    }
    return failed || (log->live && call_reader_if_due(log, time_ns) < 0) ? -1 : 0;
}

/* Record the beginning of a call. Return its flags (see `turns.TorchEvent`), or -1 with an exception
 * set. If the beginning was recorded before the exception, the end is recorded too. */
static int record_begin(Watch *watch, PyObject *target, PyObject *args, PyObject *kwargs)
{
    Log *log = watch->log;
    int flags = 0;
    if (watch->phase == FORWARD) {
        PyObject *grad = PyObject_CallObject(log->is_grad_enabled, NULL);
        if (grad == NULL)
            return -1;
        flags = (grad == Py_True) | (is_training(log, target) << 1);
        Py_DECREF(grad);
    } else if (watch->phase == BACKWARD) {
        flags = append_loss(log, args, kwargs);
        if (flags < 0)
            return -1;
    }
    int64_t time_ns = now_ns();
    if (!log->has_stepped && watch->phase != BACKWARD && append_usage(log, time_ns) < 0)
        return -1;
    if (append_event(log, BEGIN, watch->phase, flags, time_ns, (int64_t)(intptr_t)target, 0) < 0)
        return -1;
    if (call_reader_if_due(log, time_ns) < 0) {
        record_end(watch, target); /* the exception stays set */
        return -1;
    }
    return flags;
}

/* Remove the frames of flatout from the traceback of the exception that is set. */
static void strip_traceback(Log *log)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    if (traceback != NULL && log->strip_frames != NULL) {
        PyObject *stripped = PyObject_CallFunctionObjArgs(log->strip_frames, traceback, NULL);
        if (stripped == NULL) {
            PyErr_Clear();
        } else {
            Py_DECREF(traceback);
            traceback = stripped;
            if (traceback == Py_None)
                Py_CLEAR(traceback);
        }
    }
    PyErr_Restore(type, value, traceback);
}

static PyObject *watch_call(PyObject *self, PyObject *args, PyObject *kwargs)
{
    Watch *watch = (Watch *)self;
    Log *log = watch->log;
    PyObject *target =
        watch->owner != NULL && PyTuple_Size(args) > 0 ? PyTuple_GetItem(args, 0) : NULL;
    PyObject *original = find_original(watch, target == NULL ? NULL : (PyObject *)Py_TYPE(target));
    if (original == NULL)
        return NULL;
    PyObject *result = NULL;

    if (log->awake && watch->before != Py_None && target != NULL) {
        PyObject *done = PyObject_CallFunctionObjArgs(watch->before, target, NULL);
        if (done == NULL)
            goto finished;
        Py_DECREF(done);
    }
    int recorded = is_recorded(watch, target);
    if (recorded && watch->phase == FORWARD) {
        recorded = is_root(log, target);
        if (recorded < 0)
            goto finished;
    }
    if (!recorded) {
        result = PyObject_Call(original, args, kwargs);
        goto finished;
    }
    int flags = record_begin(watch, target, args, kwargs);
    if (flags < 0)
        goto finished;
    log->depth[watch->phase]++;
    if (watch->phase == FORWARD && log->wrap_forward != Py_None &&
        (flags & 1 || log->wraps_inference)) {
        PyObject *rest = PyTuple_GetSlice(args, 1, PyTuple_Size(args));
        PyObject *keywords = kwargs;
        if (keywords == NULL)
            keywords = PyDict_New();
        else
            Py_INCREF(keywords);
        if (rest != NULL && keywords != NULL)
            result = PyObject_CallFunctionObjArgs(log->wrap_forward, original, target, rest,
                                                  keywords, NULL);
        Py_XDECREF(rest);
        Py_XDECREF(keywords);
        if (result == NULL)
            strip_traceback(log);
    } else {
        result = PyObject_Call(original, args, kwargs);
    }
    if (log->depth[watch->phase] > 0) /* a fork inside the call resets the depth */
        log->depth[watch->phase]--;
    if (record_end(watch, target) < 0)
        Py_CLEAR(result);
finished:
    Py_DECREF(original);
    return result;
}

/* Return whether a code object has a name, and a file whose path ends with `file`. */
static int is_code_of(PyObject *code, const char *name, const char *file)
{
    int result = 0;
    PyObject *code_name = PyObject_GetAttrString(code, "co_name");
    PyObject *code_file = PyObject_GetAttrString(code, "co_filename");
    PyObject *suffix = PyUnicode_FromString(file);
    if (code_name != NULL && code_file != NULL && suffix != NULL &&
        PyUnicode_CompareWithASCIIString(code_name, name) == 0)
        result = PyUnicode_Tailmatch(code_file, suffix, 0, PY_SSIZE_T_MAX, 1) == 1;
    Py_XDECREF(code_name);
    Py_XDECREF(code_file);
    Py_XDECREF(suffix);
    PyErr_Clear();
    return result;
}

#ifdef _WIN32
static const char eval_frame_file[] = "torch\\_dynamo\\eval_frame.py";
#else
static const char eval_frame_file[] = "torch/_dynamo/eval_frame.py";
#endif

/* Return whether the attribute lookup comes from OptimizedModule._initialize of torch._dynamo.
 * torch.compile needs the original method there, because it compiles only methods written in
 * Python. */
static int is_called_by_compile(void)
{
    PyFrameObject *frame = PyEval_GetFrame(); /* borrowed */
    if (frame == NULL)
        return 0;
    PyObject *code = (PyObject *)PyFrame_GetCode(frame);
    int result = is_code_of(code, "_initialize", eval_frame_file);
    Py_DECREF(code);
    return result;
}

static PyObject *watch_get(PyObject *self, PyObject *instance, PyObject *owner)
{
    Watch *watch = (Watch *)self;
    if (instance == NULL || instance == Py_None)
        return find_original(watch, owner);
    PyObject *function = self;
    Py_INCREF(function);
    if (is_called_by_compile()) {
        Py_DECREF(function);
        function = find_original(watch, (PyObject *)Py_TYPE(instance));
        if (function == NULL)
            return NULL;
    }
    PyObject *method = PyObject_CallFunctionObjArgs(watch->method_type, function, instance, NULL);
    Py_DECREF(function);
    return method;
}

static PyObject *watch_getattro(PyObject *self, PyObject *name)
{
    PyObject *value = PyObject_GenericGetAttr(self, name);
    if (value != NULL || !PyErr_ExceptionMatches(PyExc_AttributeError))
        return value;
    PyErr_Clear();
    PyObject *original = find_original((Watch *)self, NULL);
    if (original == NULL)
        return NULL;
    value = PyObject_GetAttr(original, name);
    Py_DECREF(original);
    return value;
}

static PyObject *watch_repr(PyObject *self)
{
    PyObject *original = find_original((Watch *)self, NULL);
    if (original == NULL)
        return NULL;
    PyObject *result = PyObject_Repr(original);
    Py_DECREF(original);
    return result;
}

static PyObject *watch_reduce(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    PyObject *operators = PyImport_ImportModule("operator");
    if (operators == NULL)
        return NULL;
    PyObject *first = PyObject_CallMethod(operators, "itemgetter", "i", 0);
    Py_DECREF(operators);
    if (first == NULL)
        return NULL;
    PyObject *original = find_original((Watch *)self, NULL);
    if (original == NULL) {
        Py_DECREF(first);
        return NULL;
    }
    return Py_BuildValue("(N((N)))", first, original);
}

static int watch_init(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"log", "phase", "original", "owner", "name", "before", NULL};
    Watch *watch = (Watch *)self;
    PyObject *log, *original, *owner, *name, *before;
    int phase;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OiOOOO", names, &log, &phase, &original, &owner,
                                     &name, &before))
        return -1;
    PyObject *types = PyImport_ImportModule("types");
    if (types == NULL)
        return -1;
    watch->method_type = PyObject_GetAttrString(types, "MethodType");
    Py_DECREF(types);
    if (watch->method_type == NULL)
        return -1;
    Py_INCREF(log);
    watch->log = (Log *)log;
    watch->phase = phase;
    if (original != Py_None) {
        Py_INCREF(original);
        watch->original = original;
    }
    if (owner != Py_None) {
        Py_INCREF(owner);
        watch->owner = owner;
    }
    Py_INCREF(name);
    watch->name = name;
    Py_INCREF(before);
    watch->before = before;
    return 0;
}

/* A class that was created at run time forms a reference cycle with the watch in its namespace. */
static int watch_traverse(PyObject *self, visitproc visit, void *arg)
{
    Watch *watch = (Watch *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(watch->original);
    Py_VISIT(watch->owner);
    Py_VISIT(watch->before);
    return 0;
}

static int watch_clear(PyObject *self)
{
    Watch *watch = (Watch *)self;
    Py_CLEAR(watch->original);
    Py_CLEAR(watch->owner);
    return 0;
}

static void watch_dealloc(PyObject *self)
{
    Watch *watch = (Watch *)self;
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    if (watch->weak_references != NULL)
        PyObject_ClearWeakRefs(self);
    watch_clear(self);
    Py_XDECREF((PyObject *)watch->log);
    Py_XDECREF(watch->name);
    Py_XDECREF(watch->before);
    Py_XDECREF(watch->method_type);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static PyMethodDef watch_methods[] = {
    {"__reduce__", watch_reduce, METH_NOARGS, "Pickles the original function."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef watch_members[] = {
    {"original", T_OBJECT, offsetof(Watch, original), READONLY,
     "The replaced function; None if the class inherits the function."},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Watch, weak_references), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot watch_slots[] = {
    {Py_tp_doc, "Watch(log, phase, original, owner, name, before): records calls of a function."},
    {Py_tp_init, watch_init},
    {Py_tp_traverse, watch_traverse},
    {Py_tp_clear, watch_clear},
    {Py_tp_dealloc, watch_dealloc},
    {Py_tp_members, watch_members},
    {Py_tp_call, watch_call},
    {Py_tp_descr_get, watch_get},
    {Py_tp_getattro, watch_getattro},
    {Py_tp_repr, watch_repr},
    {Py_tp_methods, watch_methods},
    {0, NULL},
};

#ifndef Py_TPFLAGS_METHOD_DESCRIPTOR
#define Py_TPFLAGS_METHOD_DESCRIPTOR (1UL << 17)
#endif

static PyType_Spec watch_spec = {
    .name = "flatout.intercept._watch.Watch",
    .basicsize = sizeof(Watch),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_METHOD_DESCRIPTOR | Py_TPFLAGS_HAVE_GC,
    .slots = watch_slots,
};

/* A global optimizer step hook of torch, which is called as hook(optimizer, args, kwargs). */
typedef struct {
    PyObject_HEAD
    Log *log;
    int end;
} StepHook;

static PyObject *step_hook_call(PyObject *self, PyObject *args, PyObject *kwargs)
{
    StepHook *hook = (StepHook *)self;
    Log *log = hook->log;
    (void)kwargs;
    if (!log->awake || PyTuple_Size(args) < 1 || is_ignored_thread(log, OPTIMIZER))
        Py_RETURN_NONE;
    PyObject *optimizer = PyTuple_GetItem(args, 0);
    PyObject *callback = hook->end ? log->after_optimizer_step : log->before_optimizer_step;
    if (callback != Py_None && hook->end) { /* the time of callbacks belongs to the step */
        PyObject *done = PyObject_CallFunctionObjArgs(callback, optimizer, NULL);
        if (done == NULL)
            return NULL;
        Py_DECREF(done);
    }
    int64_t time_ns = now_ns();
    if (hook->end && append_usage(log, time_ns) < 0)
        return NULL;
    log->has_stepped = 1;
    if (append_event(log, hook->end ? END : BEGIN, OPTIMIZER, 0, time_ns,
                  (int64_t)(intptr_t)optimizer, 0) < 0)
        return NULL;
    if (call_reader_if_due(log, time_ns) < 0)
        return NULL;
    if (callback != Py_None && !hook->end) {
        PyObject *done = PyObject_CallFunctionObjArgs(callback, optimizer, NULL);
        if (done == NULL)
            return NULL;
        Py_DECREF(done);
    }
    Py_RETURN_NONE;
}

static int step_hook_init(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"log", "end", NULL};
    PyObject *log;
    int end;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Op", names, &log, &end))
        return -1;
    Py_INCREF(log);
    ((StepHook *)self)->log = (Log *)log;
    ((StepHook *)self)->end = end;
    return 0;
}

static void step_hook_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    Py_XDECREF((PyObject *)((StepHook *)self)->log);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static PyType_Slot step_hook_slots[] = {
    {Py_tp_doc, "StepHook(log, end): an optimizer hook that records begin or end of a step."},
    {Py_tp_init, step_hook_init},
    {Py_tp_dealloc, step_hook_dealloc},
    {Py_tp_call, step_hook_call},
    {0, NULL},
};

static PyType_Spec step_hook_spec = {
    .name = "flatout.intercept._watch.StepHook",
    .basicsize = sizeof(StepHook),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = step_hook_slots,
};

static int add_type(PyObject *module, PyType_Spec *spec)
{
    PyObject *type = PyType_FromModuleAndSpec(module, spec, NULL);
    if (type == NULL)
        return -1;
    int failed = PyModule_AddType(module, (PyTypeObject *)type);
    Py_DECREF(type);
    return failed;
}

static int execute(PyObject *module)
{
    if (add_type(module, &log_spec) < 0 || add_type(module, &watch_spec) < 0 ||
        add_type(module, &step_hook_spec) < 0)
        return -1;
    return 0;
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, execute},
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_watch",
    .m_doc = "Watching callables from C.",
    .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__watch(void)
{
    return PyModuleDef_Init(&definition);
}
